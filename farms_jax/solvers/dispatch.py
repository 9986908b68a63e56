"""Windows -> pooled eigenvalues: the empirical spectral density (ESD) of every layer, in one traced call."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.buffer_callback import buffer_callback

from farms_jax._axes import Axes, as_matrices
from farms_jax._windows import Grid
from farms_jax.solvers import accelerator, cpu

Solver = Literal["auto", "gram", "gram64", "svd"]

SOLVING = threading.Lock()
"""Held while the host solves: each solver takes all cores, and two would put BLAS's threads back in the wrong order."""


class Options(NamedTuple):
    """How windows are solved: static, hashable.

    Attributes:
        axes: rows and columns of the weights.
        platform: `"cpu"` solves on the host; any other in batches, on the device.
        solver: `"gram"`, `"gram64"` or `"svd"`, see `choose_solver`.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once.
    """

    axes: Axes
    platform: str
    solver: Solver
    max_batch_bytes: int


def in_working_precision(weight: Any) -> Array:
    """Convert a weight to float32, float64 under x64, or the complex dtype of that precision."""
    return jnp.asarray(weight, jnp.result_type(complex if jnp.iscomplexobj(weight) else float))


def pooled_eigenvalues(weights: Sequence[Any], grids: Sequence[Grid], options: Options) -> list[Array]:
    """Eigenvalues (squared singular values, no division by a dimension) of all windows of each layer.

    Args:
        weights: L weights.
        grids: L grids.
        options: how to solve.

    Returns:
        L arrays (D, E), ascending, real, not negative, in the working precision.
    """
    if not weights:
        return []
    axes, platform, solver, max_bytes = options
    weights = [in_working_precision(weight) for weight in weights]
    if platform != "cpu":
        stacks = [as_matrices(weight, axes) for weight in weights]
        return accelerator.batched_spectra(stacks, grids, svd=solver == "svd", max_batch_bytes=max_bytes)

    def on_host(context: Any, spectra: Sequence[Any], arrays: Sequence[Any]) -> None:
        del context
        stacks = [as_matrices(read_only(array), axes) for array in arrays]
        with SOLVING:
            found = cpu.spectra(stacks, grids, solver=solver, max_bytes=max_bytes)
        for out, values in zip(spectra, found, strict=True):
            np.asarray(out)[...] = values

    counts = [
        grid.num_eigenvalues(axes.stack_shape(weight.shape)[0]) for weight, grid in zip(weights, grids, strict=True)
    ]
    shapes = [
        jax.ShapeDtypeStruct((grid.divisions, count), weight.real.dtype)
        for weight, grid, count in zip(weights, grids, counts, strict=True)
    ]
    # Not a `pure_callback`: that copies its arguments in a thread of XLA's pool, which has one for each core or device,
    # and all of them may be in callbacks that wait for such a copy; on a single core one is enough for a standstill.
    return buffer_callback(on_host, shapes, vmap_method="sequential")(weights)


def read_only(buffer: Any) -> np.ndarray:
    """View the memory of XLA that a callback is given as an array that cannot be written to by mistake."""
    array = np.asarray(buffer)
    array.setflags(write=False)
    return array


def choose_solver(solver: Solver, *, platform: str, exact: bool) -> Literal["gram", "gram64", "svd"]:
    """Choose the solver that `"auto"` stands for, and check that the platform has it.

    Args:
        solver: see `analyze`.
        platform: see `Options`.
        exact: small eigenvalues count too.

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
        return cpu.window_spectra(on_host, grids, solver=solver, max_bytes=max_batch_bytes)
    double = solver == "gram64"
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        # One call for each layer: it is compiled for each shape of a layer, not for each selection of layers.
        values = [
            accelerator.device_windows(
                jnp.asarray(stack, np.result_type(stack.dtype, np.float64) if double else None),
                grid,
                svd=solver == "svd",
                max_batch_bytes=max_batch_bytes,
            )
            for stack, grid in zip(stacks, grids, strict=True)
        ]
        return [np.asarray(part) for part in values]
