"""Eigenvalues on CPU: LAPACK over single matrices, in threads, outside XLA.

Batched LAPACK inside an XLA program on CPU can wait forever (jaxlib 0.10: all threads idle), and OpenBLAS's own threads
compete with XLA's for the cores. So the windows are solved here, behind one callback: LAPACK on one matrix at a time,
one thread per core, and BLAS held to one thread meanwhile.
"""

import functools
import os
import threading
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
_MIN_TASK = 4  # windows; with fewer small ones, threads wait for the interpreter's lock more than they compute
_SOLVING = threading.Lock()  # two solvers at once would put BLAS's threads back in the wrong order


class _Layer(NamedTuple):
    """The windows of a layer, numbered 0, ..., K * W - 1 kernel position after position, and where their values go."""

    stack: np.ndarray
    grid: Grid
    dtype: np.dtype  # to compute in, real or complex
    values: np.ndarray  # (K * W, n)
    runs: list[gram_matrices.Run]  # windows that share a Gram matrix; empty where each has its own

    @property
    def window_cost(self) -> float:
        return self.grid.window_cost(is_complex=np.iscomplexobj(self.stack))

    @property
    def largest_run(self) -> int:
        """Bytes of the largest product that windows share, and of a copy of one window's block of it."""
        return max((self.dtype.itemsize * (run.size**2 + self.grid.gram_rows**2) for run in self.runs), default=0)

    def window_bytes(self, most_copied: int | None = None) -> int:
        """Bytes of a window's Gram matrix and of a copy of the window, or of `most_copied` of its entries."""
        entries = self.grid.rows * self.grid.cols
        copied = entries if most_copied is None else min(entries, most_copied)
        return self.dtype.itemsize * (copied + self.grid.gram_rows**2)


class _Task(NamedTuple):
    """Windows `[first, last)` of a layer; with a run, that run of the kernel position which they make up."""

    layer: _Layer
    first: int
    last: int
    cost: float
    run: gram_matrices.Run | None = None


def spectra(stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, solver: str, max_bytes: int) -> list[np.ndarray]:
    """Return pooled eigenvalues (D, E), ascending, of every layer, in its precision; see `window_spectra`."""

    def pool(values: np.ndarray, stack: np.ndarray, grid: Grid) -> np.ndarray:
        return np.sort(grid.pool(values.astype(np.finfo(stack.dtype).dtype, copy=False)), axis=-1)

    values = window_spectra(stacks, grids, solver=solver, max_bytes=max_bytes)
    return _in_threads(cores(), pool, values, stacks, grids)


def window_spectra(
    stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, solver: str, max_bytes: int
) -> list[np.ndarray]:
    """Return eigenvalues (K * W, n) of stacks (K, R, C), window by window: each row ascending, real, never negative.

    Stacks may be complex, and views; one with NaN or Inf gives zeros. `"gram"` solves Gram matrices in the stack's
    precision, and again in float64 those of a layer whose median is too far below its largest eigenvalue to be exact;
    `"gram64"` solves and returns all in float64; `"svd"` squares singular values in the stack's precision. `max_bytes`
    bounds the windows and Gram matrices alive at once, over all threads, down to one window at a time.
    """
    found = solve(stacks, grids, solver=solver, max_bytes=max_bytes)
    if solver != "gram":
        return found
    coarse = [i for i, grid in enumerate(grids) if found[i].dtype != np.float64 and _is_coarse(grid.pool(found[i]))]
    if coarse:
        fine = [stacks[i] for i in coarse], [grids[i] for i in coarse]
        for i, values in zip(coarse, solve(*fine, solver="gram64", max_bytes=max_bytes), strict=True):
            found[i] = values.astype(found[i].dtype)
    return found


def _is_coarse(values: np.ndarray) -> bool:
    """Tell whether float32's rounding may move eigenvalues in the upper half of a spectrum (D, E) by over 1e-4."""
    middle = values.shape[1] // 2
    return bool((np.partition(values, middle)[:, middle] < COARSE * values.max(-1)).any())


def solve(stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, solver: str, max_bytes: int) -> list[np.ndarray]:
    """Return what `window_spectra` does, in one pass: `"gram"` leaves the layers that are not exact as they are."""
    gram = solver != "svd"
    layers = [_layer(stack, grid, solver, max_bytes) for stack, grid in zip(stacks, grids, strict=True)]
    # A Gram matrix of one large window needs no copy of all of it, only of a few columns in another precision.
    copied = gram_matrices.BLOCK_ENTRIES if gram else None
    needed = max((max(layer.window_bytes(copied), layer.largest_run) for layer in layers), default=1)
    workers = max(1, min(cores(), max_bytes // needed))
    finite = [layer for layer in layers if np.isfinite(layer.stack).all()]
    # The costliest first, so that no core is left with a large one at the end.
    tasks = sorted(_tasks(finite, workers, max_bytes // workers), key=lambda task: -task.cost)
    if all(map(_is_large, grids)):
        workers = max(1, min(workers, len(tasks)))
    # BLAS gets the cores that are left without a worker, for lack of memory or of large windows.
    threads = cores() // workers
    solve_task = functools.partial(_solve_task, gram=gram, one_thread=threads == 1)
    with _SOLVING, _blas().limit(limits=threads, user_api="blas"):
        _in_threads(workers, solve_task, tasks)
    return [layer.values for layer in layers]


def _layer(stack: np.ndarray, grid: Grid, solver: str, max_bytes: int) -> _Layer:
    dtype = np.result_type(stack.dtype, np.float64) if solver == "gram64" else stack.dtype
    values = np.zeros((len(stack) * len(grid.starts), grid.gram_rows), np.finfo(dtype).dtype)
    layer = _Layer(stack, grid, dtype, values, [] if solver == "svd" else gram_matrices.shared_runs(grid))
    # A product that would be larger than the bound is not shared.
    return layer if layer.largest_run <= max_bytes else layer._replace(runs=[])


def _solve_task(task: _Task, *, gram: bool, one_thread: bool) -> None:
    stack, grid, dtype, values, _ = task.layer
    if task.run is not None:
        matrix = stack[task.first // len(grid.starts)]
        found = gram_matrices.run_eigenvalues(matrix, task.run, grid, dtype, one_thread=one_thread)
        values[task.first + task.run.windows] = found
        return
    windows = cut_windows(stack, grid, task.first, task.last)
    if gram:
        found = gram_matrices.gram_eigenvalues(windows, dtype, one_thread=one_thread)
    else:
        found = _singular_values_squared(windows)
    values[task.first : task.last] = found


def each_in_threads(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Call a function of single matrices for each, one thread per core, with BLAS held to one thread meanwhile."""
    with _SOLVING, _blas().limit(limits=1, user_api="blas"):
        return _in_threads(cores(), function, *arguments)


def _in_threads(workers: int, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    try:
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(function, *arguments))
    except RuntimeError:
        # While the interpreter shuts down it starts no threads; JAX then still computes results that nobody has read.
        return list(map(function, *arguments))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # once: the BLAS libraries of numpy and SciPy are loaded with them, and stay


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_large(grid: Grid) -> bool:
    return grid.gram_rows >= _LARGE


def _tasks(layers: Sequence[_Layer], workers: int, max_bytes: int) -> Iterator[_Task]:
    share = sum(layer.window_cost * len(layer.values) for layer in layers) / (workers * _TASKS_PER_CORE)
    for layer in layers:
        count, starts = len(layer.values), len(layer.grid.starts)
        if layer.runs:
            for first in range(0, count, starts):
                for run in layer.runs:
                    yield _Task(layer, first, first + starts, layer.window_cost * len(run.windows), run)
            continue
        size = max(1 if _is_large(layer.grid) else _MIN_TASK, int(share / layer.window_cost))
        size = max(1, min(size, max_bytes // layer.window_bytes()))
        for first in range(0, count, size):
            last = min(first + size, count)
            yield _Task(layer, first, last, layer.window_cost * (last - first))


def cut_windows(stack: np.ndarray, grid: Grid, first: int, last: int) -> np.ndarray:
    """Return windows `[first, last)` of the K * W of a stack (K, R, C), each turned to (r, c) with r <= c.

    A single window is a view; several are copied.
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
