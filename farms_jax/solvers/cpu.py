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
_LARGE = 1000  # rows from which a window is worth a thread of its own
_TASKS_PER_CORE = 4
_MIN_TASK = 4  # windows; with fewer small ones, threads take turns at the interpreter's lock more than they compute


class _Layer(NamedTuple):
    """The windows of a layer and where their eigenvalues go.

    The windows are numbered 0, ..., K * W - 1, kernel position after position.
    """

    stack: np.ndarray
    grid: Grid
    values: np.ndarray  # (K * W, n)
    runs: list[gram_matrices.Run]  # of windows that share a Gram matrix; none where each has its own

    @property
    def itemsize(self) -> int:
        """Bytes of a number, which may be solved in double precision."""
        return 16 if np.iscomplexobj(self.stack) else 8

    @property
    def cost(self) -> float:
        """Cost of one window: operations, those of a complex number counted fourfold, up to a factor."""
        rows, cols = self.grid.rows, self.grid.cols
        return float(min(rows, cols)) ** 2 * max(rows, cols) * (self.itemsize // 8) ** 2


class _Task(NamedTuple):
    """Windows `[first, last)` of a layer, or those of a run at the kernel position that they make up."""

    layer: _Layer
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
        gram: solve by Gram matrices; else by singular values, in the stacks' precision.
        precision: precision of the Gram matrices; `None`: the stacks'.

    Returns:
        L arrays (K * W, n), each row ascending; real, never negative, in that precision.
    """
    layers = [_layer(stack, grid, max_bytes, gram, precision) for stack, grid in zip(stacks, grids, strict=True)]
    workers = max(1, min(cores(), max_bytes // max((_most_bytes(layer, gram) for layer in layers), default=1)))
    finite = [layer for layer in layers if np.isfinite(layer.stack).all()]
    # The costliest first, so that no core is left with a large one at the end.
    tasks = sorted(_tasks(finite, workers, max_bytes // workers), key=lambda task: -task.cost)
    if all(map(_is_large, grids)):
        workers = max(1, min(workers, len(tasks)))
    # Cores that memory, or too few large windows, leave without a worker go to BLAS.
    threads = cores() // workers
    solve_task = functools.partial(_solve_task, gram=gram, precision=precision, one_thread=threads == 1)
    with _blas().limit(limits=threads, user_api="blas"):
        _in_threads(workers, solve_task, tasks)
    return [layer.values for layer in layers]


def _layer(stack: np.ndarray, grid: Grid, max_bytes: int, gram: bool, precision: type[np.floating] | None) -> _Layer:
    values = np.zeros((len(stack) * len(grid.starts), min(grid.rows, grid.cols)), precision or _real(stack.dtype))
    layer = _Layer(stack, grid, values, gram_matrices.shared_runs(grid) if gram else [])
    # A Gram matrix that would be larger than the bound is not shared.
    return layer if _largest_run(layer) <= max_bytes else layer._replace(runs=[])


def _largest_run(layer: _Layer) -> int:
    sizes = (gram_matrices.bytes_of_run(run, layer.grid, layer.itemsize) for run in layer.runs)
    return max(sizes, default=0)


def _most_bytes(layer: _Layer, gram: bool) -> int:
    """Bytes of the largest thing that a worker needs at the least."""
    # A Gram matrix of one large window needs no copy of it, only of a few columns in another precision.
    copied = gram_matrices.BLOCK_ENTRIES if gram else layer.grid.rows * layer.grid.cols
    return max(_bytes(layer, copied), _largest_run(layer))


def _solve_task(task: _Task, *, gram: bool, precision: type[np.floating] | None, one_thread: bool) -> None:
    stack, grid, values, _ = task.layer
    if task.run is not None:
        matrix = stack[task.first // len(grid.starts)]
        found = gram_matrices.run_eigenvalues(matrix, task.run, grid, precision, one_thread=one_thread)
        values[task.first + np.array(task.run.windows)] = found
        return
    windows = cut_windows(stack, grid, task.first, task.last)
    if gram:
        found = gram_matrices.gram_eigenvalues(windows, precision, one_thread=one_thread)
    else:
        found = _singular_values_squared(windows)
    values[task.first : task.last] = found


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


def _bytes(layer: _Layer, entries: int) -> int:
    """Bytes of a window's Gram matrix and of a copy of the window, or of as many of its `entries`."""
    grid = layer.grid
    return layer.itemsize * (min(grid.rows * grid.cols, entries) + min(grid.rows, grid.cols) ** 2)


def _tasks(layers: Sequence[_Layer], workers: int, max_bytes: int) -> Iterator[_Task]:
    share = sum(layer.cost * len(layer.values) for layer in layers) / (workers * _TASKS_PER_CORE)
    for layer in layers:
        count, starts = len(layer.values), len(layer.grid.starts)
        if layer.runs:
            for first in range(0, count, starts):
                for run in layer.runs:
                    yield _Task(layer, first, first + starts, layer.cost * len(run.windows), run)
            continue
        size = max(1 if _is_large(layer.grid) else _MIN_TASK, int(share / layer.cost))
        size = max(1, min(size, max_bytes // _bytes(layer, layer.grid.rows * layer.grid.cols)))
        for first in range(0, count, size):
            last = min(first + size, count)
            yield _Task(layer, first, last, layer.cost * (last - first))


def cut_windows(stack: np.ndarray, grid: Grid, first: int, last: int) -> np.ndarray:
    """Cut windows `[first, last)` of the K * W of a stack.

    Args:
        stack: shape (K, R, C).
        grid: grid of the layer.
        first: number of the first window.
        last: number after that of the last one.

    Returns:
        Shape (last - first, r, c) with r <= c; a window alone is a view, several are copied.
    """
    if grid.transposed:
        stack = stack.swapaxes(1, 2)
    position, start = np.divmod(np.arange(first, last), len(grid.starts))
    rows, cols = np.array(grid.starts)[start].T
    if last - first == 1:
        windows = stack[position[0] :, rows[0] :, cols[0] :][:1, : grid.rows, : grid.cols]
    else:
        views = np.lib.stride_tricks.sliding_window_view(stack, (grid.rows, grid.cols), axis=(1, 2))
        windows = views[position, rows, cols]
    return windows if grid.rows <= grid.cols else windows.swapaxes(1, 2)


def _singular_values_squared(windows: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (np.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0) ** 2
