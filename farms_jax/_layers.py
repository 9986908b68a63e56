"""Which weights of a network are layers, and how their windows lie."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from farms_jax._axes import FLAX_AXES, Axes, LeafAxes
from farms_jax._axis_rules import axes_spelt, declared_axes
from farms_jax._default_axes import LeftOut, default_spelling
from farms_jax._names import indexed_names, matching
from farms_jax._tail import Tail
from farms_jax._windows import Grid, Window, make_grid
from farms_jax.errors import InputError, LeftOutWarning, listed

_UNDECLARED = 0.1  # share of the weights that may be left out, for want of a declaration, without a warning
_THIN = 4  # independent eigenvalues of a fit; with fewer, the alpha of noise lies anywhere between 1.5 and 6
SAY_IT = "say it with `axes` or `stack` (see farms_jax.AxisRules), or `exclude` them"


class Leaf(NamedTuple):
    """A leaf that holds a layer or a stack of layers.

    Attributes:
        name: name of the leaf.
        weight: the array, or anything with its `shape` and `dtype`.
        axes: what its axes count.
        grid: the windows of each of its layers.
    """

    name: str
    weight: Any
    axes: LeafAxes
    grid: Grid

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(L, K, R, C): layers, kernel positions, rows and columns."""
        return self.axes.matrices_shape(self.weight.shape)

    @property
    def is_kernel(self) -> bool:
        """Whether it has kernel positions."""
        return self.axes.is_kernel(len(self.weight.shape))

    @property
    def layers(self) -> list[str]:
        """Names of the L layers."""
        return indexed_names(self.name, self.axes.stack_shape(self.weight.shape))

    def indexed_layers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and index in the stack of every layer."""
        return list(zip(self.layers, self.axes.indices(self.weight.shape), strict=True))


class Selection(NamedTuple):
    """The layers of a network, and what is none.

    Attributes:
        leaves: the leaves that hold layers, in given order.
        left_out: (name, reason) of every other leaf.
        axes: (name, axes) of the leaves that hold layers or have a stack.
        excluded: single layers of a stack that are to be left out of the report.
        undeclared: the leaves, (name, array) pairs, that are left out because nothing says what their axes count.
    """

    leaves: list[Leaf]
    left_out: list[tuple[str, str]]
    axes: list[tuple[str, LeafAxes]]
    excluded: list[str]
    undeclared: list[tuple[str, Any]]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers."""
        return tuple(layer for leaf in self.leaves for layer in leaf.layers)

    @property
    def num_positions(self) -> tuple[int, ...]:
        """Kernel positions of each layer; 0 for a matrix that is no convolution's."""
        return tuple(leaf.shape[1] * leaf.is_kernel for leaf in self.leaves for _ in leaf.layers)


def select_layers(
    leaves: Sequence[tuple[str, Any]],
    window: Window | None,
    tail: Tail,
    axes: Any = FLAX_AXES,
    exclude: str | Iterable[str] = (),
    *,
    stack: Any = None,
    params: Any = None,
    thin: bool = False,
) -> Selection:
    """Return which leaves, (name, array) pairs, are layers.

    The arrays are not read: anything with `shape` and `dtype` will do. `axes` and `stack` are those of `analyze`;
    `params` is what they are called with where they are functions. With `thin`, matrices that have `too_few`
    eigenvalues for a tail are layers too.
    """
    known = axes_of_leaves(leaves, axes, stack, params)
    layers = {name: indexed_names(name, known[name].stack_shape) for name, _ in leaves}
    excluded = matching({name for leaf in layers for name in (leaf, *layers[leaf])}, exclude)
    found = Selection([], [], [], [], [])
    for name, leaf in leaves:
        if name in excluded or excluded.issuperset(layers[name]):
            chosen = LeftOut("excluded")
        else:
            chosen = _fitting(name, leaf, known[name].axes, window, tail, thin=thin)
        if isinstance(chosen, Leaf):
            found.leaves.append(chosen)
            found.axes.append((name, chosen.axes))
            found.excluded.extend(layer for layer in layers[name] if layer in excluded)
            continue
        found.left_out.append((name, chosen.reason))
        if known[name].stack:
            found.axes.append((name, LeafAxes((), (), known[name].stack)))
        if chosen.undeclared:
            found.undeclared.append((name, leaf))
    return found


class Known(NamedTuple):
    """What is known of the axes of one leaf, declared or recognised.

    Attributes:
        axes: what they count, or why the leaf holds no matrices.
        stack: those of its stack.
        stack_shape: their lengths.
    """

    axes: LeafAxes | LeftOut
    stack: tuple[int, ...]
    stack_shape: tuple[int, ...]


def axes_of_leaves(leaves: Sequence[tuple[str, Any]], axes: Any, stack: Any, params: Any) -> dict[str, Known]:
    """Return what is known of the axes of every leaf, by name; the arguments are those of `select_layers`."""
    default, declared = declared_axes(leaves, params, axes, stack)
    whole = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in leaves}
    # TensorFlow's names end so.
    shapes = {
        name.removesuffix(":0"): tuple(size for axis, size in enumerate(shape) if axis not in declared[name].stack)
        for name, shape in whole.items()
    }
    known = {}
    for name, leaf in leaves:
        own = declared[name]
        if reason := _unfit(leaf):
            found = LeftOut(reason)
        elif not own.is_matrix:
            found = LeftOut("declared as no matrix")
        else:
            found = own.axes or default_spelling(name.removesuffix(":0"), shapes, default)
            if isinstance(found, str | Axes):
                found = axes_spelt(name, found, whole[name], own.stack)
        known[name] = Known(found, own.stack, tuple(whole[name][axis] for axis in own.stack))
    return known


def warn_of_undeclared(undeclared: Sequence[tuple[str, Any]], layers: Sequence[Leaf]) -> None:
    """Warn where a large share of the weights is left out because nothing says what its axes count."""
    missing = sum(math.prod(leaf.shape) for _, leaf in undeclared)
    total = missing + sum(math.prod(leaf.shape) for leaf in layers)
    if missing > _UNDECLARED * total:
        warnings.warn(
            f"{missing / total:.0%} of the weights are left out, because nothing says what their axes "
            f"count: {listed([name for name, _ in undeclared], 3, ', ')}; {SAY_IT}",
            LeftOutWarning,
            stacklevel=3,
        )


def _fitting(
    name: str, leaf: Any, axes: LeafAxes | LeftOut, window: Window | None, tail: Tail, *, thin: bool
) -> Leaf | LeftOut:
    """Return a leaf with its windows, or why a fit of its layers has too little to go by."""
    if isinstance(axes, LeftOut):
        return axes
    shape = axes.matrices_shape(leaf.shape)
    grid = make_grid(window, shape[1:], is_kernel=axes.is_kernel(len(leaf.shape)))
    reason = "" if thin else too_few(shape[1:], grid, window, tail)
    return LeftOut(reason) if reason else Leaf(name, leaf, axes, grid)


def too_few(shape: tuple[int, int, int], grid: Grid, window: Window | None, tail: Tail) -> str:
    """Return why a layer of shape (K, R, C) has too few eigenvalues for a tail, in words; empty where it has enough."""
    positions, rows, cols = shape
    if positions * min(rows, cols) < _THIN:
        return "too thin for a fit"
    pooled = grid.divisions if window is not None and window.divisions == "pooled" else 1
    count = pooled * grid.num_eigenvalues(positions)
    return f"too few eigenvalues: {count}, fewer than {tail.min_count}" if count < tail.min_count else ""


def _unfit(leaf: Any) -> str | None:
    """Return the reason why a leaf is no weight, whatever its name and axes, or `None`."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return f"not an array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return f"dtype {leaf.dtype}, not floating point"
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
