"""Eigenvalues of windows by their Gram matrices, which overlapping windows share.

The windows of a dense matrix that start in one column lie over the same columns. Their Gram matrices are blocks on the
diagonal of one larger product, that of all their rows: for 15 windows of 2000 rows in 4096 it costs as much as four.
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
_NEAR_BEST = (
    1.1  # times the least cost: the shortest run within it, which takes less memory and spreads over more cores
)


class Run(NamedTuple):
    """Windows of a dense matrix that share one product.

    Attributes:
        windows: their numbers in the grid, in order.
        span: rows and columns of the matrix that they cover together, as (first, last) of each.
        by_columns: they differ in their columns, and have their rows in common; else the reverse.
        offsets: where each starts within the span.
    """

    windows: tuple[int, ...]
    span: tuple[tuple[int, int], tuple[int, int]]
    by_columns: bool
    offsets: tuple[int, ...]


def shared_runs(grid: Grid) -> list[Run]:
    """Sort the windows of a grid into runs that share a product.

    Windows of (2, 3) that start in rows 0, 1 and columns 0, 2 make two runs: both rows of column 0, both of column 2.

    Args:
        grid: grid of a dense matrix or a kernel.

    Returns:
        Runs that hold every window once; none where sharing does not pay.
    """
    starts = np.array(grid.starts)
    rows, cols = (np.unique(axis) for axis in starts.T)
    if grid.divisions > 1 or grid.transposed or len(rows) * len(cols) != len(starts):
        return []
    # Products are as small as they can be: over the longer axis of the windows.
    choices = [(_length(rows, grid.rows), False)] if grid.rows <= grid.cols else []
    choices += [(_length(cols, grid.cols), True)] if grid.cols <= grid.rows else []
    (cost, length), by_columns = min(choices)
    if length == 1 or cost > _WORTH * min(grid.rows, grid.cols) ** 2:
        return []
    return list(_runs(grid, rows, cols, length, by_columns=by_columns))


def _length(starts: np.ndarray, size: int) -> tuple[float, int]:
    """Entries of the product per window, and how many windows should share one."""
    step = int(starts[1] - starts[0]) if len(starts) > 1 else 0
    costs = [(size + (count - 1) * step) ** 2 / count for count in range(1, len(starts) + 1)]
    best = min(costs)
    return best, next(count for count, cost in enumerate(costs, 1) if cost <= _NEAR_BEST * best)


def _runs(grid: Grid, rows: np.ndarray, cols: np.ndarray, length: int, *, by_columns: bool) -> Iterator[Run]:
    numbers = np.arange(len(rows) * len(cols)).reshape(len(rows), len(cols))  # of the grid's starts, row after row
    size, common_size = (grid.cols, grid.rows) if by_columns else (grid.rows, grid.cols)
    differ, common, of = (cols, rows, numbers) if by_columns else (rows, cols, numbers.T)
    parts = -(-len(differ) // length)
    for start, windows in zip(common, of, strict=True):
        for part in np.array_split(np.arange(len(differ)), parts):
            first, last = int(differ[part[0]]), int(differ[part[-1]]) + size
            own, shared = (first, last), (int(start), int(start) + common_size)
            span = (shared, own) if by_columns else (own, shared)
            offsets = tuple((differ[part] - first).tolist())
            yield Run(tuple(windows[part].tolist()), span, by_columns, offsets)


def run_eigenvalues(
    matrix: np.ndarray, run: Run, grid: Grid, precision: type[np.floating] | None, *, one_thread: bool
) -> np.ndarray:
    """Eigenvalues (W, n) of the windows of a run, each row ascending.

    Args:
        matrix: shape (R, C), real or complex.
        run: windows of the matrix, from `shared_runs`.
        grid: grid of the matrix.
        precision: precision to compute in; `None`: the matrix's own.
        one_thread: BLAS is held to one thread; large windows are then reduced in two stages.

    Returns:
        Real, not negative.
    """
    (top, bottom), (left, right) = run.span
    covered = matrix[top:bottom, left:right]
    gram = _grams((covered.T if run.by_columns else covered)[None], precision)[0]
    size = min(grid.rows, grid.cols)
    # One after the other: the reduction overwrites them, and they overlap.
    blocks = (gram[start : start + size, start : start + size] for start in run.offsets)
    return np.concatenate([_eigenvalues(np.array(block[None], order="C"), one_thread=one_thread) for block in blocks])


def gram_eigenvalues(windows: np.ndarray, precision: type[np.floating] | None, *, one_thread: bool) -> np.ndarray:
    """Eigenvalues (W, r) of windows (W, r, c) with r <= c, each row ascending; see `run_eigenvalues`."""
    return _eigenvalues(_grams(windows, precision), one_thread=one_thread)


def _eigenvalues(grams: np.ndarray, *, one_thread: bool) -> np.ndarray:
    in_two = one_thread and two_stage.is_faster(grams.dtype, grams.shape[1])
    values = (two_stage.symmetric_eigenvalues if in_two else symmetric_eigenvalues)(grams)
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0)


def _grams(windows: np.ndarray, precision: type[np.floating] | None) -> np.ndarray:
    """Upper triangles of Gram matrices (W, r, r), in another precision from copies of a few columns at a time."""
    dtype = np.result_type(windows.dtype, precision) if precision else windows.dtype
    count, rows, cols = windows.shape
    grams = np.zeros((count, rows, rows), dtype)
    width = cols if windows.dtype == dtype else max(_MIN_BLOCK, BLOCK_ENTRIES // (count * rows))
    for first in range(0, cols, width):
        add_products(grams, windows[:, :, first : first + width].astype(dtype, copy=False))
    return grams


def bytes_of_run(run: Run, grid: Grid, itemsize: int) -> int:
    """Bytes of the product that a run's windows share, and of one window's block of it."""
    first, last = run.span[1 if run.by_columns else 0]
    return itemsize * ((last - first) ** 2 + min(grid.rows, grid.cols) ** 2)
