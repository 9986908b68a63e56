"""A plain float64 numpy reading of the specification: loops, no tricks."""

import numpy as np


def eigenvalues(windows):
    """Squared singular values of all windows, ascending; rounding noise of a deficient rank is exactly zero."""
    pooled = []
    for window in windows:
        window = np.asarray(window, np.result_type(window, np.float64))  # complex ones stay complex
        values = np.linalg.svd(window, compute_uv=False) ** 2
        floor = values.max() * min(window.shape) * np.finfo(np.float64).eps
        pooled.append(np.where(values > floor, values, 0))
    return np.sort(np.concatenate(pooled))


def fit(values, i):
    """Alpha and KS distance of the tail from index i on."""
    n = len(values) - i
    logs = np.log(values[i:])
    alpha = 1 + n / (logs.sum() - n * logs[0])
    distance = np.abs(1 - (values[i:] / values[i]) ** (1 - alpha) - np.arange(n) / n).max()
    return alpha, distance


def tail(values, rule, xmin_pos=2, bins=100, min_eigenvalue=None):
    """(alpha, distance, xmin) of an ascending spectrum by one of the rules; zeros are never thresholds."""
    if min_eigenvalue is not None and (values > min_eigenvalue).any():
        values = values[values > min_eigenvalue]
    first = int((values <= 0).sum())
    if rule == "median":
        i = max(int(len(values) / xmin_pos), first)
        return *fit(values, i), values[i]
    tried = range(first, len(values) - 1)
    if rule == "peak":
        logs = np.log10(values[first:])
        counts, edges = np.histogram(logs, bins)
        x = 10 ** edges[np.argmax(counts)]
        tried = [i for i in tried if np.log10(0.95 * x) <= values[i] <= 1.5 * x]
    if not len(tried):
        return 0.0, 1.0, 0.0
    fits = [fit(values, i) for i in tried]
    best = int(np.argmin([distance for _, distance in fits]))
    return *fits[best], values[tried[best]]
