"""Windows -> pooled eigenvalues: the empirical spectral density (ESD) of every layer, in one traced call."""

import contextlib
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


class Options(NamedTuple):
    """How windows are solved: static, hashable."""

    axes: Axes
    platform: str  # "cpu" solves on the host; any other in batches, on the device
    solver: Solver  # chosen, not "auto"
    max_bytes: int  # bound on the bytes of windows and Gram matrices alive at once


def in_working_precision(weight: Any) -> Array:
    """Convert a weight to float32, float64 under x64, or the complex dtype of that precision."""
    return jnp.asarray(weight, jnp.result_type(complex if jnp.iscomplexobj(weight) else float))


def pooled_eigenvalues(weights: Sequence[Any], grids: Sequence[Grid], options: Options) -> list[Array]:
    """Return the squared singular values of all windows, pooled: an array (D, E) per layer, ascending, not negative.

    They are real, in the working precision, and not divided by a dimension.
    """
    if not weights:
        return []
    axes, platform, solver, max_bytes = options
    weights = [in_working_precision(weight) for weight in weights]
    if platform != "cpu":
        stacks = [as_matrices(weight, axes) for weight in weights]
        return accelerator.spectra(stacks, grids, solver=solver, max_bytes=max_bytes)

    def on_host(context: Any, spectra: Sequence[Any], arrays: Sequence[Any]) -> None:
        del context
        stacks = [as_matrices(read_only(array), axes) for array in arrays]
        found = cpu.spectra(stacks, grids, solver=solver, max_bytes=max_bytes)
        for out, values in zip(spectra, found, strict=True):
            np.asarray(out)[...] = values

    def spectrum(weight: Array, grid: Grid) -> jax.ShapeDtypeStruct:
        positions, _, _ = axes.stack_shape(weight.shape)
        return jax.ShapeDtypeStruct((grid.divisions, grid.num_eigenvalues(positions)), weight.real.dtype)

    # Not a `pure_callback`: that copies its arguments in a thread of XLA's pool, which has one for each core or device,
    # and all of them may be in callbacks that wait for such a copy; on a single core one is enough for a standstill.
    return buffer_callback(on_host, list(map(spectrum, weights, grids)), vmap_method="sequential")(weights)


def read_only(buffer: Any) -> np.ndarray:
    """View an argument of a callback, which is XLA's own memory, as an array that cannot be written to."""
    array = np.asarray(buffer)
    array.setflags(write=False)
    return array


def choose_solver(solver: Solver, *, platform: str, exact: bool) -> Literal["gram", "gram64", "svd"]:
    """Return the solver that `"auto"` stands for; `exact` where small eigenvalues count too.

    Raises:
        ValueError: `"gram64"` on an accelerator without `jax_enable_x64`.
    """
    if solver == "auto":
        return "gram" if not exact else "gram64" if platform == "cpu" else "svd"
    if solver == "gram64" and platform != "cpu" and jnp.result_type(float) != np.float64:
        raise ValueError(f"solver 'gram64' on {platform} needs jax_enable_x64; take 'svd' without it")
    return solver


def window_eigenvalues(
    stacks: Sequence[Any], grids: Sequence[Grid], *, platform: str, solver: Solver, max_bytes: int
) -> list[np.ndarray]:
    """Return the eigenvalues of stacks (K, R, C), window by window: real arrays (K * W, n), each row ascending.

    For concrete arrays only. Kernel positions follow one another. `"gram64"` needs no `jax_enable_x64` here and gives
    float64; the other solvers keep the stack's precision. The arguments are those of `Options`.
    """
    if platform == "cpu":
        on_host = [np.asarray(stack) for stack in stacks]
        return cpu.window_spectra(on_host, grids, solver=solver, max_bytes=max_bytes)
    double = solver == "gram64"
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        values: list[Array] = []
        for stack, grid in zip(stacks, grids, strict=True):
            array = jnp.asarray(stack, np.result_type(stack.dtype, np.float64) if double else None)
            # One call for each layer: it is compiled for each shape of a layer, not for each selection of layers.
            values += accelerator.window_spectra([array], (grid,), solver=solver, max_bytes=max_bytes)
        return [np.asarray(part) for part in values]
