"""Eigenvalues of windows by their Gram matrices, which overlapping windows share.

The windows of a dense matrix that start in one column cover the same columns, so their Gram matrices are diagonal
blocks of one larger product, that of all their rows: for 15 windows of 2000 rows in 4096 it costs as much as four.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from farms_jax._windows import Grid
from farms_jax.solvers import two_stage
from farms_jax.solvers.lapack import add_products, symmetric_eigenvalues

BLOCK_ENTRIES = 2**22  # entries copied at a time into another precision
_MIN_BLOCK = 256  # columns: narrower ones make slow products
_WORTH = 0.9  # of the plain cost: windows share where that saves a tenth at least
_NEAR_BEST = 1.1  # times the least cost: a shorter run within it takes less memory and spreads over more cores


class Run(NamedTuple):
    """Windows of a dense matrix that share one product."""

    windows: np.ndarray  # their numbers in the grid, int, ascending
    rows: slice  # that they cover together
    cols: slice
    by_columns: bool  # they have the same rows and differ in their columns; else the reverse
    offsets: np.ndarray  # of their first rows, or columns, within those covered, int


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
            covered = (common, own) if by_columns else (own, common)
            yield Run(windows[part], *covered, by_columns, offsets=starts[part] - own.start)


def run_eigenvalues(
    matrix: np.ndarray, run: Run, grid: Grid, precision: type[np.floating] | None, *, one_thread: bool
) -> np.ndarray:
    """Return eigenvalues (W, n), real, not negative, each row ascending, of a run's windows of a matrix (R, C).

    `precision` is the one to compute in, `None` the matrix's own. Where BLAS is held to `one_thread`, large windows are
    reduced in two stages.
    """
    covered = matrix[run.rows, run.cols]
    gram = _grams((covered.T if run.by_columns else covered)[None], precision)[0]
    size = grid.gram_rows
    # One after the other: the reduction overwrites them, and they overlap.
    blocks = (gram[start : start + size, start : start + size] for start in run.offsets)
    return np.concatenate([_eigenvalues(np.array(block[None], order="C"), one_thread=one_thread) for block in blocks])


def gram_eigenvalues(windows: np.ndarray, precision: type[np.floating] | None, *, one_thread: bool) -> np.ndarray:
    """Return eigenvalues (W, r) of windows (W, r, c) with r <= c, each row ascending; see `run_eigenvalues`."""
    return _eigenvalues(_grams(windows, precision), one_thread=one_thread)


def _eigenvalues(grams: np.ndarray, *, one_thread: bool) -> np.ndarray:
    in_two = one_thread and two_stage.is_faster(grams.dtype, grams.shape[1])
    values = (two_stage.symmetric_eigenvalues if in_two else symmetric_eigenvalues)(grams)
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0)


def _grams(windows: np.ndarray, precision: type[np.floating] | None) -> np.ndarray:
    """Return Gram matrices (W, r, r), upper triangles only; a few columns at a time are copied to another precision."""
    dtype = np.result_type(windows.dtype, precision) if precision else windows.dtype
    count, rows, cols = windows.shape
    grams = np.zeros((count, rows, rows), dtype)
    width = cols if windows.dtype == dtype else max(_MIN_BLOCK, BLOCK_ENTRIES // (count * rows))
    for first in range(0, cols, width):
        add_products(grams, windows[:, :, first : first + width].astype(dtype, copy=False))
    return grams


def bytes_of_run(run: Run, grid: Grid, itemsize: int) -> int:
    """Return the bytes of the product that a run's windows share, and of one window's block of it."""
    covered = run.cols if run.by_columns else run.rows
    return itemsize * (int(covered.stop - covered.start) ** 2 + grid.gram_rows**2)
