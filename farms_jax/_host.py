"""Eigenvalues on CPU: LAPACK over single matrices, in threads, outside XLA.

Batched LAPACK inside an XLA program on CPU can wait forever (jaxlib 0.10: all threads idle), and OpenBLAS's own
threads fight XLA's for the cores. So the windows are solved here, behind one callback: LAPACK on one matrix at a time,
one thread per core, and BLAS held to one thread meanwhile.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from farms_jax._lapack import symmetric_eigenvalues
from farms_jax._windows import Grid

_TASKS_PER_CORE = 4
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
        stacks: L stacks of matrices (K, R, C), all of one precision, real or complex; views are fine. A stack with
            NaN or Inf gives zeros.
        grids: L grids.
        solver: `"gram"`: eigenvalues of the Gram matrices in the stacks' precision, and again in float64 for a layer
            whose median is too far below its largest eigenvalue to be exact; `"gram64"`: all in float64; `"svd"`:
            squared singular values in the stacks' precision.
        max_bytes: bound on the windows alive at once, over all threads.

    Returns:
        L arrays (D, E), ascending, real, in the stacks' precision, never negative.
    """
    if not stacks:
        return []
    if solver == "svd":
        return _run(stacks, grids, _singular_values_squared, max_bytes)
    dtype = np.dtype(np.float64) if solver == "gram64" else np.finfo(stacks[0].dtype).dtype
    pooled = _run(stacks, grids, functools.partial(_gram_eigenvalues, dtype=dtype), max_bytes)
    if dtype == np.float64:
        return pooled
    coarse = [i for i, values in enumerate(pooled) if _is_coarse(values)]
    fine = spectra([stacks[i] for i in coarse], [grids[i] for i in coarse], solver="gram64", max_bytes=max_bytes)
    for i, values in zip(coarse, fine, strict=True):
        pooled[i] = values
    return pooled


def _is_coarse(values: np.ndarray) -> bool:
    """Whether the upper half of a spectrum (D, E) holds eigenvalues that float32's rounding may move by over 1e-4."""
    return bool((values[:, values.shape[1] // 2] < 1e-3 * values[:, -1]).any())


def _run(
    stacks: Sequence[np.ndarray],
    grids: Sequence[Grid],
    solve_windows: Callable[[np.ndarray], np.ndarray],
    max_bytes: int,
) -> list[np.ndarray]:
    flat = [
        np.zeros((len(stack) * len(grid.starts), min(grid.rows, grid.cols)), np.finfo(stack.dtype).dtype)
        for stack, grid in zip(stacks, grids, strict=True)
    ]
    cores = _cores()
    tasks = sorted(_tasks(stacks, grids, cores, max_bytes // cores), key=lambda task: -task.cost)
    finite = [bool(np.isfinite(stack).all()) for stack in stacks]

    def solve(task: _Task) -> None:
        if finite[task.layer]:
            flat[task.layer][task.first : task.last] = solve_windows(_cut(stacks[task.layer], grids[task.layer], task))

    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(cores) as pool:
        list(pool.map(solve, tasks))
        return list(pool.map(lambda values, grid: np.sort(grid.pool(values), axis=-1), flat, grids))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # found once: the BLAS of numpy and of SciPy are loaded with them


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(stacks: Sequence[np.ndarray], grids: Sequence[Grid], cores: int, max_bytes: int) -> Iterator[_Task]:
    words = [2 if np.iscomplexobj(stack) else 1 for stack in stacks]
    costs = [float(min(g.rows, g.cols)) ** 2 * max(g.rows, g.cols) * w**2 for g, w in zip(grids, words, strict=True)]
    counts = [len(stack) * len(grid.starts) for stack, grid in zip(stacks, grids, strict=True)]
    share = sum(cost * count for cost, count in zip(costs, counts, strict=True)) / (cores * _TASKS_PER_CORE)
    for layer, (grid, cost, count) in enumerate(zip(grids, costs, counts, strict=True)):
        window_bytes = 8 * words[layer] * (grid.rows * grid.cols + min(grid.rows, grid.cols) ** 2)
        size = max(_MIN_TASK, int(share / cost))
        size = max(1, min(size, max_bytes // window_bytes))
        for first in range(0, count, size):
            last = min(first + size, count)
            yield _Task(layer, first, last, cost * (last - first))


def _cut(stack: np.ndarray, grid: Grid, task: _Task) -> np.ndarray:
    """Copy the windows of a task, shape (windows, r, c) with r <= c."""
    if grid.transposed:
        stack = stack.swapaxes(1, 2)
    position, start = np.divmod(np.arange(task.first, task.last), len(grid.starts))
    rows, cols = np.array(grid.starts)[start].T
    views = np.lib.stride_tricks.sliding_window_view(stack, (grid.rows, grid.cols), axis=(1, 2))
    windows = views[position, rows, cols]
    return windows if grid.rows <= grid.cols else windows.swapaxes(1, 2)


def _gram_eigenvalues(windows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    windows = windows.astype(np.result_type(windows.dtype, dtype), copy=False)
    values = symmetric_eigenvalues(windows @ windows.swapaxes(1, 2).conj())
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(dtype).eps)
    return np.where(values > floor, values, 0)


def _singular_values_squared(windows: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (np.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0) ** 2
