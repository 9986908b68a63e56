"""Windows -> pooled eigenvalues: the empirical spectral density (ESD) of every layer, in one traced call."""

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.buffer_callback import buffer_callback
from jax.scipy.linalg import eigh_tridiagonal

from farms_jax import _host
from farms_jax._matrices import Axes, as_matrices
from farms_jax._windows import Grid

Solver = Literal["auto", "gram", "gram64", "svd"]

SOLVING = threading.Lock()
"""Held while the host solves: each solver takes all cores, and two would put BLAS's threads back in the wrong order."""


def pooled_eigenvalues(
    weights: Sequence[Array],
    axes: Axes,
    grids: Sequence[Grid],
    *,
    platform: str,
    solver: Solver,
    exact: bool,
    max_batch_bytes: int,
) -> list[Array]:
    """Eigenvalues (squared singular values, no division by a dimension) of all windows of each layer.

    Args:
        weights: L weights, all of one precision, real or complex.
        axes: rows and columns of the weights.
        grids: L grids.
        platform: `"cpu"` solves on the host; any other in batches, on the device.
        solver: see `analyze`.
        exact: the small eigenvalues count too; decides what `"auto"` means.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once.

    Returns:
        L arrays (D, E), ascending, real, not negative.

    Raises:
        ValueError: `"gram64"` on an accelerator without `jax_enable_x64`.
    """
    if not weights:
        return []
    dtype = np.dtype(weights[0].real.dtype)
    chosen = chosen_solver(solver, platform=platform, exact=exact)
    if platform != "cpu":
        stacks = [as_matrices(weight, axes) for weight in weights]
        return batched_spectra(stacks, grids, svd=chosen == "svd", max_batch_bytes=max_batch_bytes)

    def on_host(context: Any, spectra: Sequence[Any], arrays: Sequence[Any]) -> None:
        del context
        stacks = [as_matrices(read_only(array), axes) for array in arrays]
        with SOLVING:
            found = _host.spectra(stacks, grids, solver=chosen, max_bytes=max_batch_bytes)
        for out, values in zip(spectra, found, strict=True):
            np.asarray(out)[...] = values

    positions = [axes.stack_shape(weight.shape)[0] for weight in weights]
    shapes = [
        jax.ShapeDtypeStruct((grid.divisions, grid.num_eigenvalues(count)), dtype)
        for grid, count in zip(grids, positions, strict=True)
    ]
    # Not a `pure_callback`: that copies its arguments in a thread of XLA's pool, which has one for each core or device,
    # and all of them may be in callbacks that wait for such a copy; on a single core one is enough for a standstill.
    return buffer_callback(on_host, shapes, vmap_method="sequential")(list(weights))


def read_only(buffer: Any) -> np.ndarray:
    """XLA's own memory, which a callback is shown, as an array that nobody can write to by mistake."""
    array = np.asarray(buffer)
    array.setflags(write=False)
    return array


def chosen_solver(solver: Solver, *, platform: str, exact: bool) -> Literal["gram", "gram64", "svd"]:
    """Choose the solver that `"auto"` stands for, and see that the platform has it.

    Args:
        solver: see `analyze`.
        platform: see `pooled_eigenvalues`.
        exact: see `pooled_eigenvalues`.

    Returns:
        The solver.

    Raises:
        ValueError: `"gram64"` on an accelerator without `jax_enable_x64`.
    """
    if solver == "auto":
        return "gram" if not exact else "gram64" if platform == "cpu" else "svd"
    if solver == "gram64" and platform != "cpu" and jnp.result_type(float) != np.float64:
        raise ValueError(f"solver 'gram64' on {platform} needs jax_enable_x64; take 'svd' without it")
    return solver


def window_eigenvalues(
    stacks: Sequence[Any], grids: Sequence[Grid], *, platform: str, solver: Solver, max_batch_bytes: int
) -> list[np.ndarray]:
    """Eigenvalues of all windows of each layer, window by window; eager only.

    Args:
        stacks: L stacks (K, R, C), of numpy or of jax, real or complex.
        grids: L grids.
        platform: `"cpu"` solves on the host; any other in batches, on the default device.
        solver: `"gram"`, `"gram64"` or `"svd"`, see `analyze`; `"gram64"` needs no `jax_enable_x64` here.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once.

    Returns:
        L arrays (K * W, n), kernel position after position, each row ascending; real, not negative, in float64 by
        `"gram64"`, else in the stack's precision.
    """
    if platform == "cpu":
        on_host = [np.asarray(stack) for stack in stacks]
        return _host.window_spectra(on_host, grids, solver=solver, max_bytes=max_batch_bytes)
    double = solver == "gram64"
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        # One call for each layer: it is compiled for each shape of a layer, not for each selection of layers.
        values = [
            _device_windows(
                jnp.asarray(stack, np.result_type(stack.dtype, np.float64) if double else None),
                grid,
                svd=solver == "svd",
                max_batch_bytes=max_batch_bytes,
            )
            for stack, grid in zip(stacks, grids, strict=True)
        ]
        return [np.asarray(part) for part in values]


@functools.partial(jax.jit, static_argnames=("grid", "svd", "max_batch_bytes"))
def _device_windows(stack: Array, grid: Grid, *, svd: bool, max_batch_bytes: int) -> Array:
    return _batched_windows([stack], [grid], svd=svd, max_batch_bytes=max_batch_bytes)[0]


def batched_spectra(stacks: Sequence[Array], grids: Sequence[Grid], *, svd: bool, max_batch_bytes: int) -> list[Array]:
    """Pooled eigenvalues by batched solvers on an accelerator: one call per window shape, across layers.

    Not for CPU, where batched LAPACK inside an XLA program can deadlock (see `_host`).

    Args:
        stacks: L stacks (K, R, C), all of one precision, real or complex.
        grids: L grids.
        svd: square singular values, instead of the eigenvalues of Gram matrices.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once.

    Returns:
        L arrays (D, E), ascending, real; of zeros for a stack with NaN or Inf.
    """
    values = _batched_windows(stacks, grids, svd=svd, max_batch_bytes=max_batch_bytes)
    return [jnp.sort(grid.pool(flat), axis=-1) for flat, grid in zip(values, grids, strict=True)]


def _batched_windows(stacks: Sequence[Array], grids: Sequence[Grid], *, svd: bool, max_batch_bytes: int) -> list[Array]:
    """Eigenvalues (K * W, n) of each layer, window by window; as `batched_spectra`."""
    by_layer: dict[int, Array] = {}
    for layers in _groups(stacks, grids):
        located = _locate([stacks[i].shape for i in layers], [grids[i] for i in layers])
        flat = jnp.concatenate([_finite_or_zero(stacks[i]).reshape(-1) for i in layers])
        shape = _oriented(grids[layers[0]])
        values = _solve_windows(flat, located, shape, svd=svd, max_batch_bytes=max_batch_bytes)
        ends = np.cumsum([len(stacks[i]) * len(grids[i].starts) for i in layers])
        by_layer.update(zip(layers, jnp.split(values, ends[:-1]), strict=True))
    return [by_layer[i] for i in range(len(grids))]


def _finite_or_zero(stack: Array) -> Array:
    return jnp.where(jnp.isfinite(stack).all(), stack, 0)


def _oriented(grid: Grid) -> tuple[int, int]:
    """(r, c) with r <= c: a window and its transpose have the same singular values."""
    return min(grid.rows, grid.cols), max(grid.rows, grid.cols)


def _groups(stacks: Sequence[Array], grids: Sequence[Grid]) -> list[list[int]]:
    """Layers of one window shape, all real or all complex, together few enough entries for 32-bit indices."""
    groups: dict[tuple[tuple[int, int], np.dtype], list[list[int]]] = {}
    for layer, grid in enumerate(grids):
        same_shape = groups.setdefault((_oriented(grid), stacks[layer].dtype), [[]])
        if sum(stacks[i].size for i in [*same_shape[-1], layer]) > np.iinfo(np.int32).max:
            same_shape.append([])
        same_shape[-1].append(layer)
    return [group for same_shape in groups.values() for group in same_shape if group]


def _locate(shapes: Sequence[tuple[int, ...]], grids: Sequence[Grid]) -> tuple[Array, Array, Array]:
    """Origin, row step and column step of each window in one array that holds the stacks end to end, each (W,)."""
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
    flat: Array, located: tuple[Array, Array, Array], shape: tuple[int, int], *, svd: bool, max_batch_bytes: int
) -> Array:
    """Eigenvalues (W, r) of the windows of one shape, so many at a time as the bound allows."""
    rows, cols = shape
    count = located[0].size
    batch = max(1, min(count, max_batch_bytes // (flat.itemsize * (rows * cols + 2 * rows * rows))))

    def one_batch(windows: tuple[Array, Array, Array]) -> Array:
        start, down, across = (part[:, None, None] for part in windows)
        index = start + down * jnp.arange(rows)[None, :, None] + across * jnp.arange(cols)[None, None, :]
        return batch_eigenvalues(flat[index], svd=svd)

    parts = [jnp.pad(part, (0, -count % batch), mode="edge").reshape(-1, batch) for part in located]
    return lax.map(one_batch, tuple(parts)).reshape(-1, rows)[:count]


def batch_eigenvalues(windows: Array, *, svd: bool) -> Array:
    """Eigenvalues (W, r) of windows (W, r, c) with r <= c, each row ascending, on an accelerator."""
    return _singular_values_squared(windows) if svd else _gram_eigenvalues(windows)


def _gram_eigenvalues(windows: Array) -> Array:
    gram = jnp.einsum("wrc,wsc->wrs", windows, windows.conj(), precision=lax.Precision.HIGHEST)
    if gram.shape[-1] == 1:
        return gram[..., 0].real
    # XLA has no tridiagonal reduction for TPU.
    values = lax.platform_dependent(gram, tpu=jnp.linalg.eigvalsh, default=_by_bisection)
    floor = values[:, -1:] * (values.shape[-1] * jnp.finfo(values.dtype).eps)
    return jnp.where(values > floor, values, 0)


def _by_bisection(gram: Array) -> Array:
    _, diagonal, off_diagonal, _ = lax.linalg.tridiagonal(gram)
    return jax.vmap(functools.partial(eigh_tridiagonal, eigvals_only=True))(diagonal, off_diagonal)


def _singular_values_squared(windows: Array) -> Array:
    values = jnp.linalg.svd(windows, compute_uv=False)[:, ::-1]
    floor = values[:, -1:] * (values.shape[-1] ** 0.5 * jnp.finfo(values.dtype).eps)
    return jnp.where(values > floor, values, 0) ** 2
