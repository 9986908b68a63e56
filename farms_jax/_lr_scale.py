"""lr_scale(): from a report to one learning-rate factor for every leaf of the parameters."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from farms_jax import mappings
from farms_jax._axes import LAYER_NDIMS
from farms_jax._names import Follow, leader, module_of, named_leaves
from farms_jax._report import METRICS, LayerReport

MappingName = Literal["linear", "sqrt", "log2", "step", "sigmoid"]


def lr_scale(
    report: LayerReport,
    params: Any,
    *,
    low: float = 0.5,
    high: float = 1.5,
    mapping: MappingName | mappings.Mapping = "linear",
    metric: str = "alpha",
    follow: Follow | None = None,
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

    Returns:
        A tree like `params` of float32 scalars.

    Raises:
        ValueError: unknown mapping or metric, `low` above `high`, or a layer that `params` does not have.
    """
    if metric not in METRICS:
        raise ValueError(f"lr_scale: metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if not callable(mapping) and mapping not in mappings.NAMED:
        raise ValueError(f"lr_scale: mapping must be a function or one of {', '.join(mappings.NAMED)}; got {mapping!r}")
    if isinstance(low, int | float) and isinstance(high, int | float) and not 0 < low <= high:
        raise ValueError(f"lr_scale: low and high must satisfy 0 < low <= high, got {low} and {high}")
    leaves = named_leaves(params)
    names = {name for name, _ in leaves}
    if unknown := sorted(set(report.names) - names):
        raise ValueError(f"lr_scale: params has no {unknown[0]!r}, which the report has; pass the analysed params")
    map_scores = mapping if callable(mapping) else mappings.NAMED[mapping]
    scales = dict(zip(report.names, _scales(report, metric, map_scores, low, high), strict=True))
    modules = [module_of(name) for name in scales]
    single = {module for module in modules if modules.count(module) == 1}
    by_module = {module: scale for module, scale in zip(modules, scales.values(), strict=True) if module in single}

    def scale_of(name: str, leaf: Any) -> Array:
        for key in (name, leader(name, follow)):
            if key in scales:
                return scales[key]
        # A weight that is no layer of the report was left out of it: it does not follow its module as a bias does.
        own = None if jnp.ndim(leaf) in LAYER_NDIMS else module_of(name)
        for key in (own, leader(name, follow)):
            if key in by_module:
                return by_module[key]
        return jnp.ones((), jnp.float32)

    return jax.tree.unflatten(jax.tree.structure(params), [scale_of(name, leaf) for name, leaf in leaves])


def _scales(report: LayerReport, metric: str, mapping: mappings.Mapping, low: float, high: float) -> list[Array]:
    """Return the factor of each layer, a float32 scalar."""
    if not report.names:
        return []
    scores = jnp.asarray(getattr(report, metric), jnp.result_type(float))
    fitted = report.alpha > 0
    least, most = scores.min(where=fitted, initial=jnp.inf), scores.max(where=fitted, initial=-jnp.inf)
    # Layers without a tail get the mean of the others, which leaves the range as it is. It is clipped because a mean of
    # equal numbers may differ from them by rounding.
    mean = jnp.where(fitted, scores, 0).sum() / jnp.maximum(fitted.sum(dtype=scores.dtype), 1)
    scores = jnp.where(fitted, scores, jnp.where(fitted.any(), jnp.clip(mean, least, most), 1))
    if mapping in mappings.NAMED.values():
        factors = mapping(scores, low, high, where=fitted)
    else:
        factors = mapping(scores, low, high)
    return list(jnp.where(fitted & (most > least), factors, 1).astype(jnp.float32))
