"""Eigenvalues on CPU: LAPACK over single matrices, in threads, outside XLA.

Batched LAPACK inside an XLA program on CPU can wait forever (jaxlib 0.10: all threads idle), and OpenBLAS's own
threads fight XLA's for the cores. So the windows are solved here, behind one callback: numpy calls LAPACK
on one matrix at a time, one thread per core, and BLAS is held to one thread meanwhile.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from farms_jax._windows import Grid

_TASKS_PER_CORE = 4
_MIN_TASK = 4  # windows; numpy keeps the interpreter locked for shorter batches, and threads would take turns


class _Task(NamedTuple):
    """A run of windows of one layer: `[first, last)` of its K * W windows, kernel position after position."""

    layer: int
    first: int
    last: int
    cost: float


def spectra(stacks: Sequence[np.ndarray], grids: Sequence[Grid], *, svd: bool, max_bytes: int) -> list[np.ndarray]:
    """Pooled eigenvalues of every layer's windows.

    Args:
        stacks: L stacks of matrices (K, R, C), float; views are fine. A stack with NaN or Inf gives zeros.
        grids: L grids.
        svd: square singular values in the stack's precision, instead of the eigenvalues of the
            float64 Gram matrix.
        max_bytes: bound on the windows alive at once, over all threads.

    Returns:
        L arrays (D, E), ascending, in the stacks' precision, never negative.
    """
    flat = [
        np.zeros((len(s) * len(g.starts), min(g.rows, g.cols)), s.dtype) for s, g in zip(stacks, grids, strict=True)
    ]
    cores = _cores()
    tasks = sorted(_tasks(stacks, grids, cores, max_bytes // cores), key=lambda task: -task.cost)
    finite = [bool(np.isfinite(stack).all()) for stack in stacks]

    def solve(task: _Task) -> None:
        if finite[task.layer]:
            windows = _cut(stacks[task.layer], grids[task.layer], task)
            values = _singular_values_squared(windows) if svd else _gram_eigenvalues(windows)
            flat[task.layer][task.first : task.last] = values

    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(cores) as pool:
        list(pool.map(solve, tasks))
        return list(pool.map(lambda values, grid: np.sort(grid.pool(values), axis=-1), flat, grids))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # found once: numpy's BLAS is loaded with numpy


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(stacks: Sequence[np.ndarray], grids: Sequence[Grid], cores: int, max_bytes: int) -> Iterator[_Task]:
    costs = [float(min(g.rows, g.cols)) ** 2 * max(g.rows, g.cols) for g in grids]
    counts = [len(stack) * len(grid.starts) for stack, grid in zip(stacks, grids, strict=True)]
    share = sum(cost * count for cost, count in zip(costs, counts, strict=True)) / (cores * _TASKS_PER_CORE)
    for layer, (grid, cost, count) in enumerate(zip(grids, costs, counts, strict=True)):
        window_bytes = 8 * (grid.rows * grid.cols + min(grid.rows, grid.cols) ** 2)
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


def _gram_eigenvalues(windows: np.ndarray) -> np.ndarray:
    windows = windows.astype(np.float64)
    values = np.linalg.eigvalsh(windows @ windows.swapaxes(1, 2))
    # Below this a value is rounding of the largest one: a matrix without full rank gets exact zeros.
    floor = values[:, -1:] * (values.shape[-1] * np.finfo(np.float64).eps)
    return np.where(values > floor, values, 0)


def _singular_values_squared(windows: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (np.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps)
    return np.where(values > floor, values, 0) ** 2
