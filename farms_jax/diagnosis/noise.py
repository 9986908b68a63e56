r"""The band of alpha that noise falls into: layers without structure, of this shape, window and law of entries.

The law of Marchenko and Pastur gives the level, `hill_alpha`. In windows of n eigenvalues, P of them in a fit and worth
V separate ones in all, log(alpha - 1) of independent entries of excess kurtosis k differs from that of the level

    by (2 / P - 0.35 - 0.55 k) / n on average, with a deviation of up to 3.7 / (n sqrt(V))

calibrated on Gaussian, uniform, Laplace, Student, Rademacher and sparse matrices, n from 16 to 512, aspect ratios 1 to
10 (`benchmarks/false_verdicts.py` measures what comes out). That both fall as 1 / n, and that the law of the entries
enters by its kurtosis alone, is the rigidity of eigenvalues (Bai and Silverstein 2004). Small windows depend on the
whole law of the entries, and so do heavy entries, whose few largest rule: there windows are drawn from the layer's own
entries, in random order.
"""

import functools
from typing import NamedTuple

import numpy as np

from farms_jax._tail import Tail
from farms_jax._windows import Grid
from farms_jax.diagnosis.resampling import separate_windows
from farms_jax.marchenko_pastur import hill_alpha

_DEVIATIONS = 3.0  # from the middle of the band to its ends: 0.3 % of normal draws lie outside
_LEAST_ROWS = 16  # eigenvalues of a window, below which the law does not hold
_ANY_LAW = 8  # below which the level depends on the law of the entries too
_HEAVY = 0.1  # excess kurtosis over n, above which it does not
_SIZE, _DRAWS, _WINDOWS = 48, 32, 64  # of drawn windows: most rows, repetitions, windows in each
_HEAVY_ROWS, _HEAVY_COLUMNS, _HEAVY_DRAWS = 128, 2048, 4  # for `heavy_alpha`: its third digit
_FINITE = 0.1  # of log(alpha - 1): what heavy entries change from the size of the drawn windows to that of the layer's


class Band(NamedTuple):
    """Alpha of noise."""

    level: float  # of large matrices; the mean of draws where it depends on the entries
    low: float
    high: float
    kurtosis: float  # of the entries, excess; 0 where they are not heavy


def noise_band(
    entries: np.ndarray,
    shape: tuple[int, ...],
    live: tuple[int, int],
    grid: Grid,
    tail: Tail,
    rng: np.random.Generator,
) -> Band:
    """Return the band of alpha, by the median rule, of noise with a layer's own entries.

    Args:
        entries: entries of the layer, not all zero: see `structure.sample`.
        shape: of its matrices, (K, R, C).
        live: rows and columns that are not zero; the band then reaches from what they alone give to what all would.
        grid: the layer's windows.
        tail: the rule, with `xmin="median"`.
        rng: for draws.
    """
    positions, count = shape[0], len(grid.starts)
    entries = _centred(entries)
    kurtosis, size = excess_kurtosis(entries), grid.gram_rows
    per_fit = positions * count // grid.divisions
    worth = positions * separate_windows(grid, power=2)
    shares = (live[0] / shape[1], live[1] / shape[2])
    levels = [grid_level(grid, tail), grid_level(grid, tail, shares)]
    heavy = kurtosis > _HEAVY * size
    if size < _LEAST_ROWS or heavy or tail.xmin_pos != 2:
        mean, spread = _drawn(entries, grid, tail, per_fit, worth, rng)
        reach = _DEVIATIONS * spread + (_FINITE if heavy else 0)
        moved = np.log((levels[1] - 1) / (levels[0] - 1))
        middles, level = [mean, mean + moved], levels[1]
        if size < _ANY_LAW or heavy:
            level = 1 + np.exp(mean + moved)
    else:
        shift, spread = (2 / per_fit - 0.35 - 0.55 * kurtosis) / size, 3.7 / (size * worth**0.5)
        middles, level = [np.log(found - 1) + shift for found in levels], levels[1]
        reach = _DEVIATIONS * spread
    low, high = 1 + np.exp(min(middles) - reach), 1 + np.exp(max(middles) + reach)
    return Band(float(level), float(low), float(high), kurtosis if heavy else 0.0)


def grid_level(grid: Grid, tail: Tail, shares: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return alpha of large windows of which these shares of rows and columns are not zero."""
    rows, cols = grid.rows * shares[grid.transposed], grid.cols * shares[not grid.transposed]
    shorter, longer = sorted((rows, cols))
    kept = min(shorter / grid.gram_rows, 1.0)  # share of the eigenvalues that are not zero
    start = max(1 - (1 - 1 / tail.xmin_pos) / kept, 0.01)  # among those
    return hill_alpha(shorter / longer, round(1 / start, 6))


@functools.cache
def heavy_alpha(ratio: float, xmin_pos: float) -> float:
    """Return alpha, by the median rule, of windows of a layer whose inputs and outputs are correlated with exponent 2.

    From exponent 2 down a power law has no mean: the largest eigenvalue holds a share of the sum that does not vanish,
    however many there are. There Martin and Mahoney (2021) set the bound of too heavy tails, and WeightWatcher that of
    its fit to a few of the largest eigenvalues. The median rule looks at all of the upper half, where the noise of the
    entries blurs the power law; so the bound is what it finds in noise between two covariances of that exponent.

    Args:
        ratio: rows over columns of a window, in (0, 1].
        xmin_pos: position of the rule.
    """
    rng, rows = np.random.default_rng(0), _HEAVY_ROWS
    cols = min(round(rows / ratio), _HEAVY_COLUMNS)
    # Deviations whose squares have the density x^-2.
    inputs, outputs = (((np.arange(size) + 0.5) / size) ** -0.5 for size in (cols, rows))
    spreads = []
    for _ in range(_HEAVY_DRAWS):
        weight = outputs[:, None] * rng.standard_normal((rows, cols)) * rng.permutation(inputs)
        spreads.append(_spreads(np.linalg.eigvalsh(weight @ weight.T)[None], xmin_pos)[0])
    return float(1 + 1 / np.mean(spreads))


def _spreads(spectra: np.ndarray, xmin_pos: float) -> np.ndarray:
    """Return 1 / (alpha - 1) of spectra (S, E), each row ascending; zeros are left out, as in `fit_tail`."""
    kept = spectra[:, int(spectra.shape[1] / xmin_pos) :]
    positive = kept > spectra[:, -1:] * 1e-12
    logs = np.log(np.where(positive, kept, 1))
    starts = np.where(positive, logs, np.inf).min(-1, keepdims=True)
    sums = np.where(positive, logs - starts, 0).sum(-1)
    return np.maximum(sums / np.maximum(positive.sum(-1), 1), 1e-6)


def excess_kurtosis(entries: np.ndarray) -> float:
    """Return that of a layer's entries, of any shape, about the mean of those that are not zero; 0 for normal ones."""
    squares = np.abs(_centred(entries)) ** 2
    mean = squares.mean()
    return float((squares**2).mean() / mean**2 - (2 if np.iscomplexobj(entries) else 3)) if mean > 0 else 0.0


def _centred(entries: np.ndarray) -> np.ndarray:
    """Return entries less their mean; zeros stay zeros: in small windows they are missing eigenvalues."""
    filled = entries != 0
    return np.where(filled, entries - (entries[filled].mean() if filled.any() else 0), 0)


def _drawn(
    entries: np.ndarray, grid: Grid, tail: Tail, per_fit: int, worth: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Return mean and deviation of log(alpha - 1) of the layer with entries drawn from its own."""
    shorter, longer = sorted((grid.rows, grid.cols))
    scale = min(1.0, _SIZE / shorter)
    shorter, longer = max(round(scale * shorter), 1), max(round(scale * longer), 1)
    pooled = min(per_fit, _WINDOWS)
    fits = min(grid.divisions, max(_WINDOWS // pooled, 1))
    windows = rng.choice(entries, (_DRAWS * fits * pooled, shorter, longer))
    values = (
        np.linalg.eigvalsh(windows @ windows.conj().swapaxes(-1, -2)) if shorter > 1 else (np.abs(windows) ** 2).sum(-1)
    )
    spectra = np.sort(values.reshape(_DRAWS * fits, -1))
    found = np.log((1 / _spreads(spectra, tail.xmin_pos)).reshape(_DRAWS, fits).mean(-1))
    # That of the layer itself, and that of the mean of the draws.
    share = fits * pooled / worth + 1 / _DRAWS
    return float(found.mean()), float(found.std(ddof=1)) * share**0.5
