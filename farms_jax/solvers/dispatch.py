"""Windows -> pooled eigenvalues: the empirical spectral density (ESD) of every layer, in one traced call."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import NamedSharding, PartitionSpec

from farms_jax._axes import LeafAxes, as_matrices
from farms_jax._scaling import in_range, in_range_traced
from farms_jax._windows import Grid
from farms_jax.solvers import accelerator, cpu

Solver = Literal["auto", "gram", "gram64", "svd"]


class Cut(NamedTuple):
    """How a leaf becomes windows: static, hashable."""

    axes: LeafAxes
    grid: Grid  # of each of its layers


class Options(NamedTuple):
    """How windows are solved: static, hashable."""

    platform: str | None  # "cpu" solves on the host, any other in batches on the device; `None`: where the program runs
    solver: Solver
    exact: bool  # small eigenvalues count too
    max_bytes: int  # bound on the bytes of windows and Gram matrices alive at once

    def solver_on(self, platform: str) -> Literal["gram", "gram64", "svd"]:
        """Return the solver for a platform, see `choose_solver`."""
        return choose_solver(self.solver, platform=platform, exact=self.exact)


def in_working_precision(weight: Any) -> Array:
    """Convert a weight to float32, float64 under x64, or the complex dtype of that precision."""
    return jnp.asarray(weight, jnp.result_type(complex if jnp.iscomplexobj(weight) else float))


class Spectra(NamedTuple):
    """Pooled eigenvalues of the layers of a leaf: `values * 4**exponents`.

    Attributes:
        values: squared singular values of all windows (L, D, E), ascending, not negative, not divided by a dimension;
            real, in the working precision.
        exponents: (L,) int32, 0 for most layers; see `_scaling`.
    """

    values: Array
    exponents: Array


def pooled_eigenvalues(weights: Sequence[Any], cuts: Sequence[Cut], options: Options) -> list[Spectra]:
    """Return the spectra of each leaf's layers."""
    if not weights:
        return []
    weights = [whole(in_working_precision(weight)) for weight in weights]
    on_host = functools.partial(_on_host, cuts=cuts, options=options)
    on_device = functools.partial(_on_device, cuts=cuts, options=options)
    if options.platform is None:
        return lax.platform_dependent(weights, cpu=on_host, default=on_device)
    return on_host(weights) if options.platform == "cpu" else on_device(weights)


def whole(weight: Array) -> Array:
    """Bring a weight with explicitly sharded axes whole to all devices; XLA does so where it is free to choose."""
    sharding = jax.typeof(weight).sharding
    return jax.sharding.reshard(weight, NamedSharding(sharding.mesh, PartitionSpec())) if any(sharding.spec) else weight


def _on_device(weights: Sequence[Array], cuts: Sequence[Cut], options: Options) -> list[Spectra]:
    shapes = [cut.axes.matrices_shape(weight.shape) for weight, cut in zip(weights, cuts, strict=True)]
    leaves, exponents = zip(
        *(jax.vmap(in_range_traced)(as_matrices(weight, cut.axes)) for weight, cut in zip(weights, cuts, strict=True)),
        strict=True,
    )
    # The layers of a stack are solved like kernel positions, and pooled apart.
    stacks = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
    grids = tuple(cut.grid for cut in cuts)
    solver = options.solver_on("default")
    values = accelerator.window_spectra(stacks, grids, solver=solver, max_bytes=options.max_bytes)
    spectra = [
        jnp.sort(jax.vmap(cut.grid.pool)(flat.reshape(layers, -1, cut.grid.gram_rows)), axis=-1)
        for flat, cut, (layers, *_) in zip(values, cuts, shapes, strict=True)
    ]
    return [Spectra(*pair) for pair in zip(spectra, exponents, strict=True)]


def _on_host(weights: Sequence[Array], cuts: Sequence[Cut], options: Options) -> list[Spectra]:
    def solve(context: Any, spectra: Sequence[Any], arrays: Sequence[Any]) -> None:
        del context
        leaves = [as_matrices(read_only(array), cut.axes) for array, cut in zip(arrays, cuts, strict=True)]
        stacks, exponents = zip(*(in_range(stack) for leaf in leaves for stack in leaf), strict=True)
        grids = [cut.grid for leaf, cut in zip(leaves, cuts, strict=True) for _ in leaf]
        found = cpu.spectra(stacks, grids, solver=options.solver_on("cpu"), max_bytes=options.max_bytes)
        layers = zip(found, exponents, strict=True)
        for own in spectra:
            values, powers = map(np.asarray, own)
            for layer in range(len(values)):
                values[layer], powers[layer] = next(layers)

    def spectrum(weight: Array, cut: Cut) -> Spectra:
        layers, positions, _, _ = cut.axes.matrices_shape(weight.shape)
        shape = layers, cut.grid.divisions, cut.grid.num_eigenvalues(positions)
        struct = jax.ShapeDtypeStruct
        return Spectra(struct(shape, weight.real.dtype), struct((layers,), np.int32))  # pyright: ignore[reportArgumentType]

    # Not a `pure_callback`: that copies its arguments in a thread of XLA's pool, which has one for each core or device,
    # and all of them may be in callbacks that wait for such a copy; on a single core one is enough for a standstill.
    return buffer_callback(solve, list(map(spectrum, weights, cuts)), vmap_method="sequential")(weights)


def read_only(buffer: Any) -> np.ndarray:
    """View an argument of a callback, which is XLA's own memory, as an array that cannot be written to."""
    array = np.asarray(buffer)
    array.setflags(write=False)
    return array


def choose_solver(solver: Solver, *, platform: str, exact: bool) -> Literal["gram", "gram64", "svd"]:
    """Return the solver for a platform; `exact` where small eigenvalues count too.

    Where there is no float64, `"svd"` takes the place of `"gram64"`: see `check_solver` for where that is an error.
    """
    if solver == "gram64" or (solver == "auto" and exact):
        has_float64 = platform == "cpu" or (solver == "gram64" and jnp.result_type(float) == np.float64)
        return "gram64" if has_float64 else "svd"
    return "gram" if solver == "auto" else solver


def check_solver(solver: Solver, platform: str) -> None:
    """Check that a platform has the solver.

    Raises:
        ValueError: `"gram64"` on an accelerator without `jax_enable_x64`.
    """
    if solver == "gram64" and platform != "cpu" and jnp.result_type(float) != np.float64:
        raise ValueError(f"solver 'gram64' on {platform} needs jax_enable_x64; take 'svd' without it")


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
