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

from farms_jax._windows import Grid
from farms_jax.solvers import gram_matrices

COARSE = 1e-3  # of the largest eigenvalue: a median below it is not exact enough in float32
_LARGE = 1000  # rows of a window from which on a thread is worth its start for it alone
_TASKS_PER_CORE = 4
_MIN_TASK = 4  # windows; with fewer small ones, threads take turns at the interpreter's lock more than they compute


class _Task(NamedTuple):
    """Windows of one layer: `[first, last)` of its K * W windows, or those of a run at one kernel position.

    Kernel position after position, windows are numbered on.
    """

    layer: int
    first: int
    last: int
    cost: float
    run: gram_matrices.Run | None = None


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
        return solve(stacks, grids, max_bytes, gram=False)
    if solver == "gram64":
        return solve(stacks, grids, max_bytes, gram=True, precision=np.float64)
    flat = solve(stacks, grids, max_bytes, gram=True)
    coarse = [i for i, grid in enumerate(grids) if flat[i].dtype != np.float64 and _is_coarse(grid.pool(flat[i]))]
    if coarse:
        fine = [stacks[i] for i in coarse], [grids[i] for i in coarse]
        for i, values in zip(coarse, window_spectra(*fine, solver="gram64", max_bytes=max_bytes), strict=True):
            flat[i] = values.astype(flat[i].dtype)
    return flat


def _is_coarse(values: np.ndarray) -> bool:
    """Whether the upper half of a spectrum (D, E) holds eigenvalues that float32's rounding may move by over 1e-4."""
    middle = values.shape[1] // 2
    return bool((np.partition(values, middle)[:, middle] < COARSE * values.max(-1)).any())


def _real(dtype: np.dtype) -> np.dtype:
    return np.finfo(dtype).dtype


def solve(
    stacks: Sequence[np.ndarray],
    grids: Sequence[Grid],
    max_bytes: int,
    *,
    gram: bool,
    precision: type[np.floating] | None = None,
) -> list[np.ndarray]:
    """Eigenvalues of every layer, window by window, in one pass and one precision.

    Args:
        stacks: see `window_spectra`.
        grids: see `window_spectra`.
        max_bytes: see `window_spectra`.
        gram: by Gram matrices; else by singular values, in the stacks' precision.
        precision: of the Gram matrices; `None`: the stacks'.

    Returns:
        L arrays (K * W, n), each row ascending; real, never negative, in that precision.
    """
    flat = [
        np.zeros((len(stack) * len(grid.starts), min(grid.rows, grid.cols)), precision or _real(stack.dtype))
        for stack, grid in zip(stacks, grids, strict=True)
    ]
    runs = [_runs(grid, _words(stack), max_bytes) if gram else [] for stack, grid in zip(stacks, grids, strict=True)]
    # A Gram matrix of one large window needs no copy of it, only a few columns in another precision.
    most = gram_matrices.BLOCK_ENTRIES if gram else None
    sizes = [_bytes(grid, _words(stack), most) for stack, grid in zip(stacks, grids, strict=True)]
    sizes += [
        gram_matrices.bytes_of_run(run, grid, 8 * _words(stack))
        for stack, grid, of_layer in zip(stacks, grids, runs, strict=True)
        for run in of_layer
    ]
    workers = max(1, min(cores(), max_bytes // max(sizes, default=1)))
    tasks = sorted(_tasks(stacks, grids, runs, workers, max_bytes // workers), key=lambda task: -task.cost)
    finite = [bool(np.isfinite(stack).all()) for stack in stacks]
    if all(map(_is_large, grids)):
        workers = max(1, min(workers, len(tasks)))
    # Cores that memory, or too few large windows, leave without a worker go to BLAS.
    threads = cores() // workers

    def solve_task(task: _Task) -> None:
        layer, run = task.layer, task.run
        if not finite[layer]:
            return
        stack, grid = stacks[layer], grids[layer]
        if run is not None:
            matrix = stack[task.first // len(grid.starts)]
            values = gram_matrices.run_eigenvalues(matrix, run, grid, precision, one_thread=threads == 1)
            flat[layer][task.first + np.array(run.windows)] = values
            return
        windows = _cut(stack, grid, task)
        if gram:
            values = gram_matrices.gram_eigenvalues(windows, precision, one_thread=threads == 1)
        else:
            values = _singular_values_squared(windows)
        flat[layer][task.first : task.last] = values

    with _blas().limit(limits=threads, user_api="blas"):
        _in_threads(workers, solve_task, tasks)
    return flat


def _runs(grid: Grid, words: int, max_bytes: int) -> list[gram_matrices.Run]:
    """Runs of windows that share a product; none where that would be larger than the bound."""
    runs = gram_matrices.shared_runs(grid)
    return runs if all(gram_matrices.bytes_of_run(run, grid, 8 * words) <= max_bytes for run in runs) else []


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


def _is_large(grid: Grid) -> bool:
    return min(grid.rows, grid.cols) >= _LARGE


def _words(stack: np.ndarray) -> int:
    return 2 if np.iscomplexobj(stack) else 1


def _bytes(grid: Grid, words: int, most_entries: int | None = None) -> int:
    """Bytes of a window, or of so many of its entries, and of its Gram matrix."""
    entries = grid.rows * grid.cols
    return 8 * words * (min(entries, most_entries or entries) + min(grid.rows, grid.cols) ** 2)


def _tasks(
    stacks: Sequence[np.ndarray],
    grids: Sequence[Grid],
    runs: Sequence[list[gram_matrices.Run]],
    workers: int,
    max_bytes: int,
) -> Iterator[_Task]:
    words = [_words(stack) for stack in stacks]
    costs = [float(min(g.rows, g.cols)) ** 2 * max(g.rows, g.cols) * w**2 for g, w in zip(grids, words, strict=True)]
    counts = [len(stack) * len(grid.starts) for stack, grid in zip(stacks, grids, strict=True)]
    share = sum(cost * count for cost, count in zip(costs, counts, strict=True)) / (workers * _TASKS_PER_CORE)
    for layer, (grid, cost, count) in enumerate(zip(grids, costs, counts, strict=True)):
        if runs[layer]:
            for first in range(0, count, len(grid.starts)):
                for run in runs[layer]:
                    yield _Task(layer, first, first + len(grid.starts), cost * len(run.windows), run)
            continue
        size = max(1 if _is_large(grid) else _MIN_TASK, int(share / cost))
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


def _singular_values_squared(windows: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (np.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0) ** 2
