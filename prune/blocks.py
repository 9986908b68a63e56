"""Pruning one block: its tensors, statistics and sparsities in, its new tensors and masks out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from .config import Method
from .methods import Groups, magnitude, wanda, wanda_variant
from .models import Network
from .sparsegpt import Factor, factorise, sparsegpt
from .walk import Statistic, Statistics, Tensors, weights_of

STATISTIC: dict[Method, Statistic | None] = {
    "magnitude": None,
    "wanda": "squares",
    "wanda_variant": "squares",
    "sparsegpt": "hessian",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each layer is pruned.

    Attributes:
        method: by which scores.
        sparsity: of each layer, by name.
        groups: N:M of each layer, which then stand for the sparsities; `None`: unstructured.
        damping: of SparseGPT, to begin with.
    """

    method: Method
    sparsity: Mapping[str, float]
    groups: Mapping[str, Groups] | None = None
    damping: float = 0.01


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned block.

    Attributes:
        tensors: all of the block, in their stored dtypes.
        masks: (out, in) bool of each layer, True where kept.
        facts: per layer the sparsity reached, and for SparseGPT the damping that was needed.
    """

    tensors: Tensors
    masks: dict[str, np.ndarray]
    facts: dict[str, dict[str, Any]]


def prune_block(network: Network, block: int, tensors: Tensors, statistics: Statistics, plan: Plan) -> Pruned:
    """Prune the linears of a block; its other tensors stay.

    Args:
        network: the model.
        block: number of the block.
        tensors: of the block, as stored.
        statistics: of `prune.walk`, those that the method needs.
        plan: what to do.

    Returns:
        The block as it will be stored: weights that SparseGPT changed are rounded to the stored dtype.

    Raises:
        InputError: a Hessian cannot be factorised.
    """
    changed, masks, facts = dict(tensors), {}, {}
    factors: dict[int, Factor] = {}  # by identity: layers that share an input share its Hessian
    for layer, weight in weights_of(network, block, tensors).items():
        statistic = statistics.get(layer)
        groups = plan.groups[layer] if plan.groups else None
        if plan.method == "sparsegpt":
            assert statistic is not None
            if id(statistic) not in factors:
                factors[id(statistic)] = _factor(statistic, plan.damping, layer)
            factor = factors[id(statistic)]
            updated, kept = sparsegpt(jnp.asarray(weight), factor, plan.sparsity[layer], groups)
            mask, new = np.asarray(kept), np.asarray(updated).astype(weight.dtype)
            facts[layer] = {"damping": factor.damping}
        else:
            mask = np.asarray(_mask(plan.method, jnp.asarray(weight), statistic, plan.sparsity[layer], groups))
            new, facts[layer] = np.where(mask, weight, np.zeros((), weight.dtype)), {}
        changed[f"{layer}.weight"], masks[layer] = new, mask
        facts[layer]["reached"] = float(1 - mask.mean())
    return Pruned(changed, masks, facts)


def _mask(method: Method, weight: Array, squares: Array | None, sparsity: float, groups: Groups | None) -> Array:
    if method == "magnitude":
        return magnitude(weight, sparsity, groups)
    assert squares is not None
    if method == "wanda":
        return wanda(weight, squares, sparsity, groups)
    return wanda_variant(weight, squares, sparsity)


def _factor(hessian: Array, damping: float, layer: str) -> Factor:
    factor = factorise(hessian, damping, layer)
    if factor.damping > damping:
        tqdm.write(f"{layer}: the Hessian needed a damping of {factor.damping:g} instead of {damping:g}")
    return factor
