"""Eigenvalues on CPU: LAPACK over single matrices, in threads, outside XLA.

Batched LAPACK inside an XLA program on CPU can wait forever (jaxlib 0.10: all threads idle), and OpenBLAS's own
threads fight XLA's for the cores. So the windows are solved here, behind one callback: LAPACK on one matrix at a time,
one thread per core, and BLAS held to one thread meanwhile.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from farms_jax._lapack import symmetric_eigenvalues
from farms_jax._windows import Grid

_TASKS_PER_CORE = 4
_BLOCK_ENTRIES = 2**22  # of a copy in another precision
_MIN_BLOCK = 256  # columns: narrower ones make slow products
_MIN_TASK = 4  # windows; numpy keeps the interpreter locked for shorter batches, and threads would take turns


class _Task(NamedTuple):
    """A run of windows of one layer: `[first, last)` of its K * W windows, kernel position after position."""

    layer: int
    first: int
    last: int
    cost: float


def spectra(stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, solver: str, max_bytes: int) -> list[np.ndarray]:
    """Pooled eigenvalues of every layer's windows.

    Args:
        stacks: L stacks of matrices (K, R, C), real or complex; views are fine. A stack with NaN or Inf gives zeros.
        grids: L grids.
        solver: see `window_spectra`.
        max_bytes: see `window_spectra`.

    Returns:
        L arrays (D, E), ascending, real, in the stacks' precision, never negative.
    """

    def pool(values: np.ndarray, stack: np.ndarray, grid: Grid) -> np.ndarray:
        return np.sort(grid.pool(values.astype(_real(stack.dtype), copy=False)), axis=-1)

    values = window_spectra(stacks, grids, solver=solver, max_bytes=max_bytes)
    return _in_threads(cores(), pool, values, stacks, grids)


def window_spectra(
    stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, solver: str, max_bytes: int
) -> list[np.ndarray]:
    """Eigenvalues of every layer, window by window.

    Args:
        stacks: L stacks of matrices (K, R, C), real or complex; views are fine. A stack with NaN or Inf gives zeros.
        grids: L grids.
        solver: `"gram"`: eigenvalues of the Gram matrices in the stacks' precision, and again in float64 for a layer
            whose median is too far below its largest eigenvalue to be exact; `"gram64"`: all in float64; `"svd"`:
            squared singular values in the stacks' precision.
        max_bytes: bound on the windows and Gram matrices alive at once, over all threads, down to one window at a time.

    Returns:
        L arrays (K * W, n), each row ascending; real, never negative, in float64 by `"gram64"`, else in the stacks'
        precision.
    """
    if solver == "svd":
        return _run(stacks, grids, _singular_values_squared, max_bytes, copies=True)
    if solver == "gram64":
        return _run(stacks, grids, functools.partial(_gram_eigenvalues, precision=np.float64), max_bytes, np.float64)
    flat = _run(stacks, grids, _gram_eigenvalues, max_bytes)
    coarse = [i for i, grid in enumerate(grids) if flat[i].dtype != np.float64 and _is_coarse(grid.pool(flat[i]))]
    if coarse:
        fine = [stacks[i] for i in coarse], [grids[i] for i in coarse]
        for i, values in zip(coarse, window_spectra(*fine, solver="gram64", max_bytes=max_bytes), strict=True):
            flat[i] = values.astype(flat[i].dtype)
    return flat


def _is_coarse(values: np.ndarray) -> bool:
    """Whether the upper half of a spectrum (D, E) holds eigenvalues that float32's rounding may move by over 1e-4."""
    middle = values.shape[1] // 2
    return bool((np.partition(values, middle)[:, middle] < 1e-3 * values.max(-1)).any())


def _real(dtype: np.dtype) -> np.dtype:
    return np.finfo(dtype).dtype


def _run(
    stacks: Sequence[np.ndarray],
    grids: Sequence[Grid],
    solve_windows: Callable[[np.ndarray], np.ndarray],
    max_bytes: int,
    precision: type[np.floating] | None = None,
    *,
    copies: bool = False,
) -> list[np.ndarray]:
    flat = [
        np.zeros((len(stack) * len(grid.starts), min(grid.rows, grid.cols)), precision or _real(stack.dtype))
        for stack, grid in zip(stacks, grids, strict=True)
    ]
    # A Gram matrix of one large window needs no copy of it, only a few columns in another precision.
    most = None if copies else _BLOCK_ENTRIES
    largest = max((_bytes(grid, _words(stack), most) for stack, grid in zip(stacks, grids, strict=True)), default=1)
    workers = max(1, min(cores(), max_bytes // largest))
    tasks = sorted(_tasks(stacks, grids, workers, max_bytes // workers), key=lambda task: -task.cost)
    finite = [bool(np.isfinite(stack).all()) for stack in stacks]

    def solve(task: _Task) -> None:
        if finite[task.layer]:
            flat[task.layer][task.first : task.last] = solve_windows(_cut(stacks[task.layer], grids[task.layer], task))

    # Cores that memory leaves without a worker go to BLAS.
    with _blas().limit(limits=cores() // workers, user_api="blas"):
        _in_threads(workers, solve, tasks)
    return flat


def _in_threads(workers: int, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    try:
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(function, *arguments))
    except RuntimeError:
        # The interpreter is on its way out and starts no thread: a result that nobody waited for, which JAX waits for.
        return list(map(function, *arguments))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # found once: the BLAS of numpy and of SciPy are loaded with them


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(stack: np.ndarray) -> int:
    return 2 if np.iscomplexobj(stack) else 1


def _bytes(grid: Grid, words: int, most_entries: int | None = None) -> int:
    """Bytes of a window, or of so many of its entries, and of its Gram matrix."""
    entries = grid.rows * grid.cols
    return 8 * words * (min(entries, most_entries or entries) + min(grid.rows, grid.cols) ** 2)


def _tasks(stacks: Sequence[np.ndarray], grids: Sequence[Grid], workers: int, max_bytes: int) -> Iterator[_Task]:
    words = [_words(stack) for stack in stacks]
    costs = [float(min(g.rows, g.cols)) ** 2 * max(g.rows, g.cols) * w**2 for g, w in zip(grids, words, strict=True)]
    counts = [len(stack) * len(grid.starts) for stack, grid in zip(stacks, grids, strict=True)]
    share = sum(cost * count for cost, count in zip(costs, counts, strict=True)) / (workers * _TASKS_PER_CORE)
    for layer, (grid, cost, count) in enumerate(zip(grids, costs, counts, strict=True)):
        size = max(_MIN_TASK, int(share / cost))
        size = max(1, min(size, max_bytes // _bytes(grid, words[layer])))
        for first in range(0, count, size):
            last = min(first + size, count)
            yield _Task(layer, first, last, cost * (last - first))


def _cut(stack: np.ndarray, grid: Grid, task: _Task) -> np.ndarray:
    """Windows of a task, shape (windows, r, c) with r <= c; one alone is a view, several are copied."""
    if grid.transposed:
        stack = stack.swapaxes(1, 2)
    position, start = np.divmod(np.arange(task.first, task.last), len(grid.starts))
    rows, cols = np.array(grid.starts)[start].T
    if task.last - task.first == 1:
        windows = stack[position[0] :, rows[0] :, cols[0] :][:1, : grid.rows, : grid.cols]
    else:
        views = np.lib.stride_tricks.sliding_window_view(stack, (grid.rows, grid.cols), axis=(1, 2))
        windows = views[position, rows, cols]
    return windows if grid.rows <= grid.cols else windows.swapaxes(1, 2)


def _gram_eigenvalues(windows: np.ndarray, precision: type[np.floating] | None = None) -> np.ndarray:
    dtype = np.result_type(windows.dtype, precision) if precision else windows.dtype
    values = symmetric_eigenvalues(_gram(windows, dtype))
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0)


def _gram(windows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Gram matrices (W, r, r) of windows (W, r, c), copied to another precision a few columns at a time."""
    if windows.dtype == dtype:
        return windows @ windows.swapaxes(1, 2).conj()
    count, rows, cols = windows.shape
    width = max(_MIN_BLOCK, _BLOCK_ENTRIES // (count * rows))
    gram = np.zeros((count, rows, rows), dtype)
    for first in range(0, cols, width):
        block = windows[:, :, first : first + width].astype(dtype)
        gram += block @ block.swapaxes(1, 2).conj()
    return gram


def _singular_values_squared(windows: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (np.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0) ** 2
