"""How far the leading singular vectors of a layer turned from one checkpoint to another."""

import numpy as np
from scipy import linalg

_BLOCK = 2**21  # entries of a matrix that are in float64 at once
_RESOLVED = 1e-12  # of the largest eigenvalue: below it a Gram matrix has no directions
ALIGNMENT = ("left_overlap", "right_overlap", "left_angle", "right_angle")


def alignment(first: np.ndarray, second: np.ndarray, directions: int) -> dict[str, float | None]:
    """Return how the spaces of the leading left (output) and right (input) singular vectors of two weights agree.

    >>> turned = alignment(np.diag([3.0, 2.0, 0.1, 0.1])[None], np.diag([3.0, 0.1, 2.0, 0.1])[None], directions=2)
    >>> {name: round(value, 3) for name, value in turned.items()}
    {'left_overlap': 0.5, 'right_overlap': 0.5, 'left_angle': 90.0, 'right_angle': 90.0}

    Args:
        first: matrices (K, R, C) of a layer, any float or complex dtype.
        second: those of the other checkpoint, of the same shape.
        directions: how many singular vectors span the spaces: at most half of the shorter axis, and the rank.

    Returns:
        By the names in `ALIGNMENT`: overlaps, the mean squared cosine of the principal angles, in [0, 1], and the
        largest of these angles, in degrees; means over the kernel positions. `None` where a matrix is zero.
    """
    if first.any() and np.array_equal(first, second):
        return dict(zip(ALIGNMENT, (1.0, 1.0, 0.0, 0.0), strict=True))
    found = [_agreement(*pair, directions) for pair in zip(first, second, strict=True)]
    known = [values for values in found if values is not None]
    means = np.mean(known, axis=0).tolist() if known else [None] * len(ALIGNMENT)
    return dict(zip(ALIGNMENT, means, strict=True))


def _agreement(first: np.ndarray, second: np.ndarray, directions: int) -> tuple[float, ...] | None:
    if first.shape[0] > first.shape[1]:
        turned = _agreement(first.T, second.T, directions)
        return turned and (turned[1], turned[0], turned[3], turned[2])
    count = min(directions, max(1, first.shape[0] // 2))
    sides = [_leading(matrix, count) for matrix in (first, second)]
    count = min(left.shape[1] for left, _ in sides)
    if count == 0:
        return None
    lefts, rights = ([side[i][:, :count] for side in sides] for i in (0, 1))
    left, right = (np.linalg.svd(a.conj().T @ b, compute_uv=False).clip(0, 1) for a, b in (lefts, rights))
    overlaps = [float((cosines**2).mean()) for cosines in (left, right)]
    return *overlaps, *(float(np.degrees(np.arccos(cosines[-1]))) for cosines in (left, right))


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the leading left and right singular vectors of a matrix that is not higher than wide, as columns."""
    rows, cols = matrix.shape
    largest = max(float(np.abs(matrix).max()), np.finfo(np.float64).tiny)
    exact = np.result_type(matrix.dtype if matrix.dtype.char in "fdFD" else np.float32, np.float64)
    width = max(1, _BLOCK // rows)
    blocks = [slice(start, start + width) for start in range(0, cols, width)]
    gram = np.zeros((rows, rows), exact)
    for block in blocks:
        part = matrix[:, block].astype(exact) / largest
        gram += part @ part.conj().T
    values, vectors = linalg.eigh(gram, subset_by_index=(rows - count, rows - 1))
    kept = values > max(values[-1] * _RESOLVED, 0)
    left, singular = vectors[:, kept][:, ::-1], np.sqrt(values[kept])[::-1]
    right = [(matrix[:, block].astype(exact) / largest).conj().T @ left for block in blocks]
    return left, np.concatenate(right) / singular
