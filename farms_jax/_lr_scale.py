"""lr_scale(): from a report to one learning-rate factor for every leaf of the parameters."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from farms_jax import mappings
from farms_jax._default_axes import is_small
from farms_jax._names import Follow, indexed_names, leader, matching, module_of, named_leaves, weights_of_bias
from farms_jax._report import METRICS, LayerReport

MappingName = Literal["linear", "sqrt", "log2", "step", "sigmoid"]
Fixed = Mapping[str, float | Literal["low", "high"]]


def lr_scale(
    report: LayerReport,
    params: Any,
    *,
    low: float = 0.5,
    high: float = 1.5,
    mapping: MappingName | mappings.Mapping = "linear",
    metric: str = "alpha",
    follow: Follow | None = None,
    range_quantiles: tuple[float, float] | None = None,
    fixed: Fixed | None = None,
) -> Any:
    r"""Turn the layers' scores into factors of the learning rate (TempBalance).

    Every layer of the report gets its factor; so do the bias and other small leaves of a module that holds this one
    layer, and the leaves that follow it; all others get 1. A layer without a tail (alpha 0) keeps 1 and does not move
    the others. Where all scores are equal, or there is one layer, every factor is 1 (the reference gives the maximum).

    Args:
        report: report of `analyze`; layers left out of it are not balanced.
        params: the tree whose leaves get factors.
        low: factor of the smallest score; the reference's `lr_min_ratio`, 0.5 there too.
        high: factor of the largest score; the reference's `lr_max_ratio`, 1.5 there too.
        mapping: `"linear"`, `"sqrt"`, `"log2"`, `"step"` (TempBalance), `"sigmoid"` (TB_Sigmoid), or a function
            of (scores, low, high), to which a layer without a tail shows the mean score: see `farms_jax.mappings`.
        metric: field of the report that serves as the score.
        follow: which layer a norm follows: `{pattern: replacement}` on leaf names, such as
            `{r"(.*)bn(\d+)/.*": r"\1conv\2/kernel"}` (by name), a function of the leaf's name such as
            `follow_order` makes (by order), or `None`: norms keep 1. It names a layer or its module.
        range_quantiles: quantiles of the scores at which they are cut before they are mapped, such as (0.1, 0.9):
            without it one outlier sets the range of all. `None`, as in the reference, cuts nothing.
        fixed: factors of some leaves by patterns of their names, such as `{r".*embed.*": "high"}`: a number, or
            `"low"` or `"high"`. What they hold moves nobody's factor.

    Returns:
        A tree like `params` of float32 factors, each in a shape that broadcasts to its leaf: (), or (L, 1, ...) for a
        stack of L layers.

    Raises:
        ValueError: unknown mapping or metric, `low` above `high`, or a layer that `params` does not have.
    """
    _check(low, high, mapping, metric, range_quantiles)
    leaves = named_leaves(params)
    stacks = {name: axes.stack for name, axes in report.axes}
    layers = {name: indexed_names(name, _stack_shape(leaf, stacks.get(name, ()))) for name, leaf in leaves}
    known = {layer for own in layers.values() for layer in own}
    if unknown := sorted(set(report.names) - known):
        raise ValueError(f"lr_scale: params has no {unknown[0]!r}, which the report has; pass the analysed params")
    pinned = _fixed_factors(fixed or {}, layers, low, high)
    pinned_layers = {layer for name in pinned for layer in layers[name]}
    counts = np.array([name not in pinned_layers for name in report.names], bool)
    map_scores = mapping if callable(mapping) else mappings.NAMED[mapping]
    factors = _factors(report, metric, map_scores, low, high, range_quantiles, counts)
    shapes = {name: jnp.shape(leaf) for name, leaf in leaves}
    own = _by_leaf(report.names, factors, layers, shapes, stacks)
    modules = Counter(map(module_of, own))
    single = {module_of(name): name for name in own if modules[module_of(name)] == 1}

    def factor_of(name: str, leaf: Any) -> Array:
        stack = stacks.get(name, ())
        if name in pinned:
            return spread_factors(pinned[name], stack, leaf)
        followed = [name] if (leading := leader(name, follow)) is None else [name, leading]
        # A weight that was left out does not follow its module, as a bias does.
        if is_small(name, jnp.ndim(leaf) - len(stack)):
            followed += [*weights_of_bias(name), module_of(name)]
        found = next((each for place in followed for each in (place, single.get(place)) if each in own), None)
        if found is None:
            return spread_factors(jnp.ones((), jnp.float32), stack, leaf)
        stack = stack or _stack_like(shapes[name], shapes[found], stacks.get(found, ()))
        return spread_factors(own[found], stack, leaf)

    return jax.tree.unflatten(jax.tree.structure(params), [factor_of(name, leaf) for name, leaf in leaves])


def _fixed_factors(fixed: Fixed, layers: Mapping[str, list[str]], low: float, high: float) -> dict[str, Array]:
    """Return the fixed factors by leaf."""
    found: dict[str, Array] = {}
    for pattern, factor in fixed.items():
        value = {"low": low, "high": high}.get(factor, factor) if isinstance(factor, str) else factor
        found |= dict.fromkeys(matching(layers, pattern, "fixed"), jnp.asarray(value, jnp.float32))
    return found


def _by_leaf(
    names: Sequence[str],
    factors: Array,
    layers: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    stacks: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """Return the factors of each leaf that holds layers, in the shape of its stack; 1 for one that has none."""
    place = {name: i for i, name in enumerate(names)}
    with_one = jnp.append(factors, 1)
    found = {}
    for name, own in layers.items():
        if not place.keys().isdisjoint(own):
            places = np.array([place.get(layer, -1) for layer in own])
            found[name] = with_one[places].reshape([shapes[name][axis] for axis in stacks.get(name, ())])
    return found


def _check(low: Any, high: Any, mapping: Any, metric: str, range_quantiles: tuple[float, float] | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"lr_scale: metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if not callable(mapping) and mapping not in mappings.NAMED:
        raise ValueError(f"lr_scale: mapping must be a function or one of {', '.join(mappings.NAMED)}; got {mapping!r}")
    if isinstance(low, int | float) and isinstance(high, int | float) and not 0 < low <= high:
        raise ValueError(f"lr_scale: low and high must satisfy 0 < low <= high, got {low} and {high}")
    if range_quantiles is not None and not 0 <= range_quantiles[0] < range_quantiles[1] <= 1:
        raise ValueError(f"lr_scale: range_quantiles must be two ascending numbers in [0, 1], got {range_quantiles}")


def _stack_like(shape: tuple[int, ...], weight: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stack of a leaf, where only that of the weight it follows is known: the same axes, counted alike."""
    for shift in (0, len(shape) - len(weight)):  # from the first axis, or from the last
        axes = tuple(axis + shift for axis in stack)
        if all(0 <= axis < len(shape) for axis in axes) and all(
            shape[axis] == weight[own] for axis, own in zip(axes, stack, strict=True)
        ):
            return axes
    return ()


def _stack_shape(leaf: Any, stack: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(jnp.shape(leaf)[axis] for axis in stack)


def spread_factors(factors: Array, stack: tuple[int, ...], leaf: Any) -> Array:
    """Return factors, one for each index of a stack or one for all, in a shape that broadcasts to a leaf.

    A leaf without the stack of the layers that it follows keeps 1. The result shares its buffer with no other: a
    training step that donates its state must find every buffer once.
    """
    shape = _stack_shape(leaf, stack)
    if factors.shape not in {(), shape}:
        factors = jnp.ones((), jnp.float32)
    in_order = jnp.broadcast_to(factors, shape).transpose(np.argsort(stack))
    others = [axis for axis in range(jnp.ndim(leaf)) if axis not in stack] if stack else []
    return jnp.array(jnp.expand_dims(in_order, others), jnp.float32, copy=True)


def _factors(
    report: LayerReport,
    metric: str,
    mapping: mappings.Mapping,
    low: float,
    high: float,
    range_quantiles: tuple[float, float] | None,
    counts: np.ndarray,
) -> Array:
    """Return the factors of the layers, float32; only those that count move the others."""
    if not report.names:
        return jnp.zeros(0, jnp.float32)
    scores = jnp.asarray(getattr(report, metric), jnp.result_type(float))
    fitted = (report.alpha > 0) & counts
    if range_quantiles is not None:
        # Of the scores themselves, nothing in between: an outlier next to a quantile does not move it.
        # Not by `nanquantile`: the NaN would stop a program under `jax_debug_nans`.
        ascending = jnp.sort(jnp.where(fitted, scores, jnp.inf))
        last = jnp.maximum(fitted.sum(dtype=scores.dtype) - 1, 0)
        lowest = ascending[jnp.ceil(range_quantiles[0] * last).astype(jnp.int32)]
        highest = ascending[jnp.floor(range_quantiles[1] * last).astype(jnp.int32)]
        scores = jnp.clip(scores, lowest, jnp.maximum(lowest, highest))
    least, most = scores.min(where=fitted, initial=jnp.inf), scores.max(where=fitted, initial=-jnp.inf)
    # Layers without a tail get the mean of the others, which leaves the range as it is. It is clipped because a mean of
    # equal numbers may differ from them by rounding.
    mean = jnp.where(fitted, scores, 0).sum() / jnp.maximum(fitted.sum(dtype=scores.dtype), 1)
    scores = jnp.where(fitted, scores, jnp.where(fitted.any(), jnp.clip(mean, least, most), 1))
    if mapping in mappings.NAMED.values():
        factors = mapping(scores, low, high, where=fitted | ~fitted.any())  # a mean of none would be NaN
    else:
        factors = mapping(scores, low, high)
    return jnp.where(fitted & (most > least), factors, 1).astype(jnp.float32)
