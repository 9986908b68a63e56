"""Eigenvalues of windows by their Gram matrices, which overlapping windows share.

The windows of a dense matrix that start in one column cover the same columns, so their Gram matrices are diagonal
blocks of one larger product, that of all their rows: for 15 windows of 2000 rows in 4096 it costs as much as four.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from farms_jax._windows import Grid
from farms_jax.solvers import two_stage
from farms_jax.solvers.lapack import add_products, symmetric_eigenvalues

BLOCK_ENTRIES = 2**22  # entries copied at a time into another precision
_MIN_BLOCK = 256  # columns: narrower ones make slow products
_WORTH = 0.9  # of the plain cost: windows share where that saves a tenth at least
_NEAR_BEST = 1.1  # times the least cost: a shorter run within it takes less memory and spreads over more cores


class Run(NamedTuple):
    """Windows of a dense matrix that share a product: they have the same columns, or the same rows `by_columns`."""

    windows: np.ndarray  # their numbers in the grid, int, ascending
    by_columns: bool
    own: slice  # rows that they cover together; columns `by_columns`
    common: slice  # columns, or rows, of each of them
    offsets: np.ndarray  # of their first rows, or columns, within `own`, int

    @property
    def size(self) -> int:
        """Rows of the product."""
        return int(self.own.stop - self.own.start)


def shared_runs(grid: Grid) -> list[Run]:
    """Return runs, each of which shares a product, that hold every window once; none where sharing does not pay.

    Windows of (2, 3) that start in rows 0, 1 and columns 0, 2 make two runs: both rows of column 0, both of column 2.
    """
    starts = np.array(grid.starts)
    rows, cols = (np.unique(axis) for axis in starts.T)
    if grid.divisions > 1 or grid.transposed or len(rows) * len(cols) != len(starts):
        return []
    # Products are as small as they can be: over the longer axis of the windows.
    choices = [(_run_length(rows, grid.rows), False)] if grid.rows <= grid.cols else []
    choices += [(_run_length(cols, grid.cols), True)] if grid.cols <= grid.rows else []
    (cost, length), by_columns = min(choices)
    if length == 1 or cost > _WORTH * grid.gram_rows**2:
        return []
    return list(_runs(grid, rows, cols, length, by_columns=by_columns))


def _run_length(starts: np.ndarray, size: int) -> tuple[float, int]:
    """Return the entries of a product per window, and the number of windows that should share one."""
    step = int(starts[1] - starts[0]) if len(starts) > 1 else 0
    costs = [(size + (count - 1) * step) ** 2 / count for count in range(1, len(starts) + 1)]
    best = min(costs)
    return best, next(count for count, cost in enumerate(costs, 1) if cost <= _NEAR_BEST * best)


def _runs(grid: Grid, rows: np.ndarray, cols: np.ndarray, length: int, *, by_columns: bool) -> Iterator[Run]:
    numbers = np.arange(len(rows) * len(cols)).reshape(len(rows), len(cols))  # of the grid's starts, row after row
    if by_columns:
        starts, size, common_starts, common_size = cols, grid.cols, rows, grid.rows
    else:
        starts, size, common_starts, common_size, numbers = rows, grid.rows, cols, grid.cols, numbers.T
    parts = np.array_split(np.arange(len(starts)), -(-len(starts) // length))
    for common_start, windows in zip(common_starts, numbers, strict=True):
        common = slice(common_start, common_start + common_size)
        for part in parts:
            own = slice(starts[part[0]], starts[part[-1]] + size)
            yield Run(windows[part], by_columns, own, common, offsets=starts[part] - own.start)


def run_eigenvalues(matrix: np.ndarray, run: Run, grid: Grid, dtype: DTypeLike, *, one_thread: bool) -> np.ndarray:
    """Return eigenvalues (W, n), real, not negative, each row ascending, of a run's windows of a matrix (R, C).

    They are computed in `dtype`. Where BLAS is held to `one_thread`, large windows are reduced in two stages.
    """
    matrix = matrix.T if run.by_columns else matrix
    gram = _grams(matrix[None, run.own, run.common], dtype)[0]
    size = grid.gram_rows
    # One after the other: the reduction overwrites them, and they overlap.
    blocks = (gram[start : start + size, start : start + size] for start in run.offsets)
    return np.concatenate([_eigenvalues(np.array(block[None], order="C"), one_thread=one_thread) for block in blocks])


def gram_eigenvalues(windows: np.ndarray, dtype: DTypeLike, *, one_thread: bool) -> np.ndarray:
    """Return eigenvalues (W, r) of windows (W, r, c) with r <= c, each row ascending; see `run_eigenvalues`."""
    return _eigenvalues(_grams(windows, dtype), one_thread=one_thread)


def _eigenvalues(grams: np.ndarray, *, one_thread: bool) -> np.ndarray:
    in_two = one_thread and two_stage.is_faster(grams.dtype, grams.shape[1])
    values = (two_stage.symmetric_eigenvalues if in_two else symmetric_eigenvalues)(grams)
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0)


def _grams(windows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return Gram matrices (W, r, r), upper triangles only; a few columns at a time are copied to another dtype."""
    count, rows, cols = windows.shape
    grams = np.zeros((count, rows, rows), dtype)
    width = cols if windows.dtype == grams.dtype else max(_MIN_BLOCK, BLOCK_ENTRIES // (count * rows))
    for first in range(0, cols, width):
        add_products(grams, windows[:, :, first : first + width].astype(grams.dtype, copy=False))
    return grams
