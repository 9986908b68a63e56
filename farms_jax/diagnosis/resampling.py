"""How sure a layer's alpha is: intervals by resampling windows, and what they mean for the order of layers.

A layer is one draw; how its alpha would scatter over draws is read off its windows, which are many smaller draws of the
same kind. Two things keep this honest. Overlapping windows say less than as many separate ones, so resamples are as
large as the number of separate windows they are worth. And a window as large as the matrix has no neighbours, so where
the estimate's own windows are worth fewer than 8 separate ones, windows of half their height serve instead. A window of
twice the height scatters 1/2 as much where entries are independent and light-tailed (linear statistics of eigenvalues
are rigid: Bai and Silverstein 2004), and 1/sqrt(2) as much where few large entries or directions rule; the second, the
careful one, is used.
`benchmarks/interval_coverage.py` measures what comes out.
"""

from collections.abc import Iterable

import numpy as np
from scipy import stats

from farms_jax._windows import Grid

_ENOUGH = 8  # separate windows; the scatter of fewer is itself too uncertain
_PAIRS = 512  # windows whose overlaps are looked at, of more


def interval_grid(grid: Grid, stack_shape: tuple[int, int, int]) -> Grid:
    """Windows whose scatter tells that of an estimate.

    Args:
        grid: windows of the estimate.
        stack_shape: (K, R, C) of the layer.

    Returns:
        `grid` itself where its windows are worth enough separate ones; else windows of half their rows and columns, at
        most half of the shorter axis, one after the other by half a window, over the whole matrix.
    """
    positions, rows, cols = stack_shape
    if grid.transposed:
        rows, cols = cols, rows
    if positions * separate_windows(grid, grid.starts) >= _ENOUGH or min(grid.rows, grid.cols) < 4:
        return grid
    height, width = grid.rows // 2, grid.cols // 2
    starts = tuple((i, j) for i in _half_steps(rows, height) for j in _half_steps(cols, width))
    return Grid(height, width, starts, 1, grid.transposed)


def _half_steps(length: int, size: int) -> list[int]:
    """Starts from one end of an axis to the other, about half a window apart."""
    count = 1 + max(1, round(2 * (length - size) / size)) if length > size else 1
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def separate_windows(grid: Grid, starts: Iterable[tuple[int, int]]) -> float:
    """How many windows without overlap as many with overlap are worth: W^2 / sum of correlations.

    The correlation of two windows is taken as the square of the share of their area that they have in common: between
    that of heavy-tailed entries (the share) and of light-tailed ones (far below its square).

    Args:
        grid: gives the windows' shape.
        starts: where the windows lie.

    Returns:
        The number, from 1 to that of the windows.
    """
    places = np.array(list(starts))
    count = len(places)
    if count == 1:
        return 1.0
    seen = places[np.linspace(0, count - 1, min(count, _PAIRS)).astype(int)]
    distance = np.abs(seen[:, None] - seen[None])
    common = np.maximum(1 - distance / [grid.rows, grid.cols], 0).prod(-1)
    np.fill_diagonal(common, 0)
    mean = (common**2).sum() / (len(seen) * (len(seen) - 1))
    return count / (1 + (count - 1) * mean)


def deviations(alphas: np.ndarray, worth: float, drawn: float, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Resample windows: how the mean alpha of as many as an estimate rests on scatters.

    Args:
        alphas: of the single windows, shape (W,); zeros, windows without a tail, are left out.
        worth: number of separate windows that these are worth.
        drawn: number of separate windows of this size that the estimate rests on.
        resamples: B.
        rng: of the draws.

    Returns:
        Deviations from the mean, shape (B,), widened as a t-distribution is against a normal one; zeros where fewer
        than two windows have a tail.
    """
    alphas = alphas[alphas > 0]
    if len(alphas) < 2:
        return np.zeros(resamples)
    size = max(2, round(drawn))
    means = rng.choice(alphas, (resamples, size)).mean(1)
    freedom = max(min(worth, len(alphas)) - 1, 1)
    small_sample = ((freedom + 1) / freedom) ** 0.5 * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    return (means - alphas.mean()) * (size / drawn) ** 0.5 * small_sample


def interval(alpha: float, scatter: np.ndarray, level: float) -> tuple[float, float]:
    """Ends of the confidence interval of an alpha, of its deviations (B,)."""
    low, high = np.quantile(scatter, [(1 - level) / 2, (1 + level) / 2])
    return alpha + float(low), alpha + float(high)


def rank_flips(
    alphas: np.ndarray, scatter: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find how sure the order of the layers is.

    >>> rank_flips(np.array([3.0, 2.0, 2.1]), np.array([[0.0, 0.0], [0.0, 0.2], [0.0, 0.0]]), 0.95)[0].tolist()
    [3, 1, 2]

    Args:
        alphas: shape (L,); `None`, NaN and 0, no tail, come last.
        scatter: deviations of each layer, shape (L, B).
        level: of the intervals, in (0, 1).

    Returns:
        Place of each layer, 1 the smallest alpha; the ends of its interval; and the share of resamples, in [0, 1], in
        which the place is another. Each (L,).
    """
    known = np.array(alphas, np.float64)
    known = np.where(known > 0, known, np.inf)
    rank = _places(known[:, None])[:, 0]
    draws = _places(known[:, None] + scatter)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(draws, tails, axis=1, method="inverted_cdf")
    return rank, low, high, (draws != rank[:, None]).mean(1)


def _places(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values, axis=0, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(1, len(values) + 1)[:, None], axis=0)
    return places
