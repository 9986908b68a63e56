"""scale_by_htmuon(): Muon with a heavy-tailed correction, as an optax transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.experimental.buffer_callback import buffer_callback

from farms_jax._axes import FLAX_AXES, LeafAxes, as_matrices, from_matrices
from farms_jax._default_axes import LeftOut
from farms_jax._layers import axes_of_leaves
from farms_jax._names import named_leaves
from farms_jax.errors import InputError
from farms_jax.solvers.cpu import each_in_threads
from farms_jax.solvers.dispatch import read_only, whole


class HTMuonState(NamedTuple):
    """State of `scale_by_htmuon`.

    Attributes:
        momentum: moving average of the gradients, a tree like the parameters.
    """

    momentum: Any


def scale_by_htmuon(
    beta: float = 0.95, power: float = 0.125, *, nesterov: bool = True, axes: Any = FLAX_AXES, stack: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the singular values of the momentum by a power of theirs (HTMuon).

    With the momentum's singular value decomposition U S V^T, the update of a matrix is U S^p V^T times
    sqrt(max(1, rows / cols)). p = 0 is Muon, which makes all singular values equal; above 0 the update has a heavier
    tail, and so in time has the weight. By the SVD itself, in float32 or complex64: on CPU one matrix at a time, in
    threads, outside XLA. Singular values that are only rounding give no update, whatever the power.

    For matrices only: give other parameters another optimizer, by `optax.partition`. Kernel positions count as inputs.

    >>> import farms_jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(farms_jax.scale_by_htmuon(), optax.scale_by_learning_rate(0.02))
    >>> state = tx.init({"dense": {"kernel": jnp.ones((8, 4))}})

    Args:
        beta: decay of the momentum.
        power: p, at least 0.
        nesterov: whether the update looks ahead by the gradient.
        axes: what the axes of the parameters count, see `analyze`.
        stack: which axes count layers, see `analyze`; each layer is a matrix of its own.

    Returns:
        The transform.

    Raises:
        InputError: a parameter is no matrix.
        ValueError: `power` is below 0.

    References:
        HTMuon: Improving Muon via Heavy-Tailed Spectral Correction, arXiv 2603.10067.
    """
    if isinstance(power, int | float) and power < 0:
        raise ValueError(f"scale_by_htmuon: power must be at least 0, got {power}")

    def init(params: optax.Params) -> HTMuonState:
        if jax.tree.leaves(params):  # `optax.tree.map_params` asks for the state of a tree without leaves
            _axes_of(params, axes, stack)
        return HTMuonState(optax.tree.zeros_like(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HTMuonState]:
        del params, extra_args
        momentum = optax.tree.update_moment(updates, state.momentum, beta, 1)
        ahead = optax.tree.update_moment(updates, momentum, beta, 1) if nesterov else momentum
        leaves, structure = jax.tree.flatten(ahead)
        new = _corrected(leaves, _axes_of(ahead, axes, stack), power)
        return jax.tree.unflatten(structure, new), HTMuonState(momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def _axes_of(params: Any, axes: Any, stack: Any) -> list[LeafAxes]:
    """Return what the axes of each leaf count, kernel positions as inputs."""
    leaves = dict(named_leaves(params))
    found = []
    for name, known in axes_of_leaves(list(leaves.items()), axes, stack, params).items():
        if isinstance(known.axes, LeftOut):
            raise InputError(
                f"scale_by_htmuon: {name} is no matrix ({known.axes.reason}); declare its axes, or give it another "
                "optimizer by optax.partition"
            )
        positions = known.axes.positions(len(leaves[name].shape))
        found.append(known.axes._replace(inputs=(*positions, *known.axes.inputs)))
    return found


def _corrected(leaves: Sequence[Array], axes: Sequence[LeafAxes], power: Any) -> list[Array]:
    """Return each leaf with the singular values of its matrices raised to a power, and scaled by its shape."""
    single = [whole(leaf.astype(jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32)) for leaf in leaves]
    matrices = [as_matrices(leaf, own)[:, 0] for leaf, own in zip(single, axes, strict=True)]
    new = lax.platform_dependent(matrices, jnp.asarray(power, jnp.float32), cpu=_on_host, default=_on_device)
    found = []
    for leaf, own, values in zip(leaves, axes, new, strict=True):
        _, rows, cols = values.shape
        scaled = values * max(1, rows / cols) ** 0.5
        found.append(from_matrices(scaled[:, None], own, leaf.shape).astype(leaf.dtype))
    return found


def _powers(numpy: Any, values: Any, power: Any, shape: tuple[int, ...]) -> Any:
    """Return singular values (..., R), descending, to a power, by NumPy or JAX's; zeros where they are rounding."""
    noise = max(shape[-2:]) * np.finfo(np.float32).eps * values[..., :1]
    return numpy.where(values > noise, values**power, 0)


def _on_device(matrices: Sequence[Array], power: Array) -> list[Array]:
    def one(stack: Array) -> Array:
        left, values, right = jnp.linalg.svd(stack, full_matrices=False)
        return (left * _powers(jnp, values, power, stack.shape)[:, None]) @ right

    return [one(stack) for stack in matrices]


def _on_host(matrices: Sequence[Array], power: Array) -> list[Array]:
    # Batched LAPACK inside an XLA program on CPU can wait forever (see `solvers.cpu`).
    def solve(context: Any, out: Sequence[Any], arrays: Sequence[Any], power: Any) -> None:
        del context
        exponent = float(np.asarray(power))

        def one(matrix: np.ndarray) -> np.ndarray:
            if not np.isfinite(matrix).all():
                return np.full_like(matrix, np.nan)
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            return (left * _powers(np, values, exponent, matrix.shape)) @ right

        singles = [matrix for stack in arrays for matrix in read_only(stack)]
        found = iter(each_in_threads(one, singles))
        for stack in map(np.asarray, out):
            for matrix in stack:
                matrix[...] = next(found)

    shapes = [jax.ShapeDtypeStruct(stack.shape, stack.dtype) for stack in matrices]
    return buffer_callback(solve, shapes, vmap_method="sequential")(matrices, power)
