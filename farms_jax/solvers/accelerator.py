"""Eigenvalues on an accelerator: batched solvers, one call for each shape of window, across layers.

Not for CPU, where batched LAPACK inside an XLA program can wait forever (see `solvers.cpu`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import eigh_tridiagonal

from farms_jax._windows import Grid


@functools.partial(jax.jit, static_argnames=("grids", "solver", "max_bytes"))
def window_spectra(stacks: Sequence[Array], grids: tuple[Grid, ...], *, solver: str, max_bytes: int) -> list[Array]:
    """Return eigenvalues (K * W, n) of stacks (K, R, C) of one precision, real or complex, window by window.

    They are eigenvalues of Gram matrices, or squared singular values by `"svd"`, in the stacks' precision, each row
    ascending; zeros for a stack with NaN or Inf. Compiled for each selection of layers.
    """
    by_layer: dict[int, Array] = {}
    for layers in _groups(stacks, grids):
        located = _locate([stacks[i].shape for i in layers], [grids[i] for i in layers])
        flat = jnp.concatenate([_finite_or_zero(stacks[i]).reshape(-1) for i in layers])
        shape = _oriented(grids[layers[0]])
        values = _solve_windows(flat, located, shape, solver=solver, max_bytes=max_bytes)
        ends = np.cumsum([len(stacks[i]) * len(grids[i].starts) for i in layers])
        by_layer.update(zip(layers, jnp.split(values, ends[:-1]), strict=True))
    return [by_layer[i] for i in range(len(grids))]


def part_of_windows(stack: Array, grid: Grid, number: Array, count: int, *, solver: str, max_bytes: int) -> Array:
    """Return eigenvalues (ceil(K * W / count), n) of part `number`, int32, of `count` equal parts of a layer's windows.

    Past the end they are those of the last window again, so that all parts have one shape.
    """
    total = len(stack) * len(grid.starts)
    size = -(-total // count)
    padded = [jnp.pad(part, (0, size * count - total), mode="edge") for part in _locate([stack.shape], [grid])]
    own = [lax.dynamic_slice_in_dim(part, number * size, size) for part in padded]
    flat = _finite_or_zero(stack).reshape(-1)
    return _solve_windows(flat, own, _oriented(grid), solver=solver, max_bytes=max_bytes)


def _finite_or_zero(stack: Array) -> Array:
    return jnp.where(jnp.isfinite(stack).all(), stack, 0)


def _oriented(grid: Grid) -> tuple[int, int]:
    """Return (r, c) with r <= c: a window and its transpose have the same singular values."""
    return min(grid.rows, grid.cols), max(grid.rows, grid.cols)


def _groups(stacks: Sequence[Array], grids: Sequence[Grid]) -> list[list[int]]:
    """Group layers of one window shape, all real or all complex, with few enough entries for 32-bit indices."""
    groups: dict[tuple[tuple[int, int], np.dtype], list[list[int]]] = {}
    for layer, grid in enumerate(grids):
        same_shape = groups.setdefault((_oriented(grid), stacks[layer].dtype), [[]])
        if sum(stacks[i].size for i in [*same_shape[-1], layer]) > np.iinfo(np.int32).max:
            same_shape.append([])
        same_shape[-1].append(layer)
    return [group for same_shape in groups.values() for group in same_shape if group]


def _locate(shapes: Sequence[tuple[int, ...]], grids: Sequence[Grid]) -> tuple[Array, Array, Array]:
    """Return origin, row step and column step, each (W,), of the windows in a flat array of all stacks, end to end."""
    located, base = [], 0
    for (positions, height, width), grid in zip(shapes, grids, strict=True):
        down, across = (1, width) if grid.transposed else (width, 1)
        origin = base + np.arange(positions)[:, None] * (height * width) + np.array(grid.starts) @ [down, across]
        steps = (down, across) if grid.rows <= grid.cols else (across, down)
        located.append(np.stack(np.broadcast_arrays(origin.reshape(-1), *steps)))
        base += positions * height * width
    origin, row_step, col_step = np.concatenate(located, axis=1).astype(np.int32)
    return jnp.asarray(origin), jnp.asarray(row_step), jnp.asarray(col_step)


def _solve_windows(
    flat: Array, located: Sequence[Array], shape: tuple[int, int], *, solver: str, max_bytes: int
) -> Array:
    """Return eigenvalues (W, r) of windows of shape (r, c) with r <= c, in batches that fit the memory bound."""
    rows, cols = shape
    count = located[0].size
    solve = _singular_values_squared if solver == "svd" else _gram_eigenvalues
    # A window, its Gram matrix, and the solver's copy of that.
    batch = max(1, min(count, max_bytes // (flat.itemsize * (rows * cols + 2 * rows * rows))))

    def one_batch(windows: tuple[Array, Array, Array]) -> Array:
        start, down, across = (part[:, None, None] for part in windows)
        index = start + down * jnp.arange(rows)[None, :, None] + across * jnp.arange(cols)[None, None, :]
        return solve(flat[index])

    parts = [jnp.pad(part, (0, -count % batch), mode="edge").reshape(-1, batch) for part in located]
    return lax.map(one_batch, tuple(parts)).reshape(-1, rows)[:count]


def _gram_eigenvalues(windows: Array) -> Array:
    gram = jnp.einsum("wrc,wsc->wrs", windows, windows.conj(), precision=lax.Precision.HIGHEST)
    if gram.shape[-1] == 1:
        return gram[..., 0].real
    # XLA has no tridiagonal reduction for TPU.
    values = lax.platform_dependent(gram, tpu=jnp.linalg.eigvalsh, default=_eigenvalues_by_bisection)
    floor = values[:, -1:] * (values.shape[-1] * jnp.finfo(values.dtype).eps)
    return jnp.where(values > floor, values, 0)


def _eigenvalues_by_bisection(gram: Array) -> Array:
    _, diagonal, off_diagonal, _ = lax.linalg.tridiagonal(gram)
    return jax.vmap(functools.partial(eigh_tridiagonal, eigvals_only=True))(diagonal, off_diagonal)


def _singular_values_squared(windows: Array) -> Array:
    values = jnp.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (values.shape[-1] ** 0.5 * jnp.finfo(values.dtype).eps)
    return jnp.where(values > floor, values, 0) ** 2
