"""How certain a layer's alpha is: intervals by resampling windows, and what they mean for the order of layers.

A layer is one draw; how its alpha would scatter over draws is read off its windows, which are many smaller draws of the
same kind. Two things keep this honest. Overlapping windows say less than as many separate ones, so resamples are as
large as the number of separate windows they are worth. And a window as large as the matrix has no neighbours, so where
the estimate's own windows are worth fewer than 8 separate ones, windows of half their height serve instead. A window of
twice the height scatters 1/2 as much where entries are independent and light-tailed (linear statistics of eigenvalues
are rigid: Bai and Silverstein 2004), 1/sqrt(2) as much where few large entries or directions rule; 2^(-3/4) is taken.
`benchmarks/interval_coverage.py` measures what comes out.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from farms_jax._tail import Tail
from farms_jax._windows import Grid
from farms_jax.diagnosis.tail_fits import fit_spectra

_ENOUGH = 8  # separate windows; the scatter of fewer is itself too uncertain
_FIT = 32  # least number of eigenvalues that one resampled alpha is fitted to
_RATE = 0.75  # alpha of a window scatters as its height to minus this
_MOST_STEPS = 16  # per axis: more windows add little but time
_NOISY = 0.5  # of resamples: where a layer's rank is more often another than its own, it is noise
_PAIRS = 512  # windows whose overlaps are computed: their pairs grow quadratically


def interval_grid(grid: Grid, stack_shape: tuple[int, int, int]) -> Grid:
    """Return the windows whose scatter tells that of an estimate over `grid`, in a layer of shape (K, R, C).

    `grid` itself where its windows are worth enough separate ones; else windows of half their rows and columns, at
    most half of the shorter axis, half a window or more from one to the next, over the whole matrix.
    """
    positions, rows, cols = stack_shape
    if grid.transposed:
        rows, cols = cols, rows
    if positions * separate_windows(grid) >= _ENOUGH or min(grid.rows, grid.cols) < 4:
        return grid
    height, width = grid.rows // 2, grid.cols // 2
    starts = tuple((i, j) for i in _half_steps(rows, height) for j in _half_steps(cols, width))
    return Grid(height, width, starts, 1, grid.transposed)


def _half_steps(length: int, size: int) -> list[int]:
    """Return starts from one end of an axis to the other, half a window apart, or further to keep them few."""
    count = 1 + min(max(1, round(2 * (length - size) / size)), _MOST_STEPS) if length > size else 1
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def separate_windows(grid: Grid, power: int = 1) -> float:
    """Return how many windows without overlap those of a grid are worth, for one kernel position, at least 1.

    W^2 over the sum of correlations. The correlation of two windows is the share of their area in common to this
    `power`: 1 where few large entries rule, 2 and above for light tails.
    """
    count = len(grid.starts)
    seen = np.array(grid.starts)[np.linspace(0, count - 1, min(count, _PAIRS)).astype(int)]
    common = np.maximum(1 - np.abs(seen[:, None] - seen[None]) / [grid.rows, grid.cols], 0).prod(-1) ** power
    pairs = max(len(seen) * (len(seen) - 1), 1)
    return count / (1 + (count - 1) * (common.sum() - len(seen)) / pairs)


def deviations(
    windows: np.ndarray, tail: Tail, grids: tuple[Grid, Grid], positions: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return how a layer's alpha deviates from its mean over resamples of windows, shape (B,).

    `windows` has the eigenvalues of each window, shape (W, n), rows ascending; `grids` are those windows, for one of
    the K kernel positions, and the windows of the estimate. The deviations are widened as a t-distribution is against
    a normal one; they are zeros where fewer than two windows have a tail.
    """
    grid, own = grids
    count, length = windows.shape
    # Windows of one kernel position may share directions: where there are positions enough, each is one draw.
    unit = count // positions if positions >= _ENOUGH else 1
    # Alpha of a few eigenvalues has no variance: windows of so few are put together.
    together = max(1, min(unit * -(-_FIT // (length * unit)), count // _ENOUGH))
    order = (np.arange(count) if unit > 1 else rng.permutation(count))[: count // together * together]
    pooled = np.sort(windows[order].reshape(-1, together * length).astype(np.float64), axis=-1)
    alphas = np.asarray(fit_spectra(pooled, tail).alpha)
    alphas = alphas[alphas > 0]
    if len(alphas) < 2:
        return np.zeros(resamples)
    drawn = positions * separate_windows(own) * (own.rows / grid.rows) ** (2 * _RATE) / together
    # Windows that share a corner vary almost freely, whatever their sum does: the mildest correlation counts here.
    worth = positions * separate_windows(grid, power=2) / together
    size, freedom = max(2, round(drawn)), max(min(worth, len(alphas)) - 1, 1)
    means = rng.choice(alphas, (resamples, size)).mean(1)
    widened = ((freedom + 1) / freedom) ** 0.5 * float(stdtrit(freedom, 0.975) / ndtri(0.975))
    return (means - alphas.mean()) * (size / drawn) ** 0.5 * widened


def interval(alpha: float, scatter: np.ndarray, level: float) -> tuple[float, float]:
    """Return the ends of the confidence interval of an alpha, from its deviations (B,)."""
    low, high = np.quantile(scatter, [(1 - level) / 2, (1 + level) / 2])
    return alpha + float(low), alpha + float(high)


def rank_flips(
    alphas: np.ndarray, scatter: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ranks, 1 for the smallest alpha, the ends of their intervals, and how often resamples have others.

    Each has shape (L,); the last is a share, in [0, 1]. Of the alphas (L,), those without a tail (`None`, NaN, 0) come
    last. `scatter` has the deviations of each layer, shape (L, B); `level` is that of the intervals, in (0, 1).

    >>> rank_flips(np.array([3.0, 2.0, 2.1]), np.array([[0.0, 0.0], [0.0, 0.2], [0.0, 0.0]]), 0.95)[0].tolist()
    [3, 1, 2]
    """
    known = np.array(alphas, np.float64)
    known = np.where(known > 0, known, np.inf)
    rank = _ranks(known[:, None])[:, 0]
    draws = _ranks(known[:, None] + scatter)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(draws, tails, axis=1, method="inverted_cdf")
    return rank, low, high, (draws != rank[:, None]).mean(1)


def order_is_noise(flips: Sequence[float | None]) -> float | None:
    """Return the median share of resamples in which layers have another rank, where it says that ranks are noise.

    `None` where the order of the layers holds, or is not known.

    >>> order_is_noise([0.94, 0.97, 0.1]), order_is_noise([0.0, 0.1, 0.95]), order_is_noise([])
    (0.94, None, None)
    """
    known = [share for share in flips if share is not None]
    median = float(np.median(known)) if known else 0.0
    return median if median >= _NOISY else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 on along the first axis; equal values rank in their order."""
    return values.argsort(axis=0, kind="stable").argsort(axis=0) + 1
