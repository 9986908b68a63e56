"""Which weights of a network are layers, and how their windows lie."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from farms_jax._axes import LAYER_NDIMS, Axes, is_kernel
from farms_jax._names import matching
from farms_jax._tail import Tail
from farms_jax._windows import Grid, Window, make_grid
from farms_jax.errors import InputError


def select_layers(
    leaves: list[tuple[str, Any]],
    window: Window | None,
    tail: Tail,
    axes: Axes,
    exclude: str | Iterable[str],
) -> tuple[list[tuple[str, Any]], list[Grid], list[tuple[str, str]]]:
    """Return the (name, array) pairs that are layers, their grids, and (name, reason) of the others, in given order.

    The arrays are not read: anything with `shape` and `dtype` will do.
    """
    excluded = matching([name for name, _ in leaves], exclude)
    layers, grids, left_out = [], [], []
    for name, leaf in leaves:
        reason = "excluded" if name in excluded else _unfit(leaf)
        if reason is None:
            stack_shape = axes.stack_shape(leaf.shape)
            grid = make_grid(window, stack_shape, is_kernel=is_kernel(leaf))
            count = grid.divisions * grid.num_eigenvalues(stack_shape[0])
            if count >= tail.min_count:
                layers.append((name, leaf))
                grids.append(grid)
                continue
            reason = f"too few eigenvalues: {count}, fewer than {tail.min_count}"
        left_out.append((name, reason))
    return layers, grids, left_out


def _unfit(leaf: Any) -> str | None:
    """Return the reason why a leaf is no layer, or `None`."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return f"not an array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return f"dtype {leaf.dtype}, not floating point"
    if len(leaf.shape) not in LAYER_NDIMS:
        return f"{len(leaf.shape)} axes: only 2-D weights and 4-D kernels are layers"
    return "empty" if 0 in leaf.shape else None


def not_finite(layers: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the names of layers, (name, array) pairs, with NaN or Inf; none where arrays are traced."""
    if any(isinstance(weight, Tracer) for _, weight in layers):
        return []
    finite = jax.device_get([_is_finite(weight) for _, weight in layers])
    return [name for (name, _), good in zip(layers, finite, strict=True) if not good]


def raise_if_not_finite(names: Sequence[str]) -> None:
    """Raise an InputError that names the layers with NaN or Inf, if there are any."""
    if names:
        raise InputError(
            f"params: NaN or Inf in {', '.join(names)}; "
            "train from an earlier checkpoint or at a smaller rate, or `exclude` the layer"
        )


def _is_finite(weight: Any) -> Any:
    if not isinstance(weight, jax.Array):
        return np.isfinite(np.asarray(weight)).all()
    if next(iter(weight.devices())).platform != "cpu":
        return _all_finite(weight)
    if not weight.is_fully_addressable:
        # Waited for: on CPU many programs under way at once would wait for each other (see `solvers.mesh`).
        return bool(_all_finite(weight))
    # On CPU NumPy sees the shards without a copy, and nothing has to be compiled.
    shards = (shard.data for shard in weight.addressable_shards if shard.replica_id == 0)
    return all(np.isfinite(np.asarray(shard)).all() for shard in shards)


@jax.jit
def _all_finite(weight: Array) -> Array:
    return jnp.isfinite(weight).all()
