"""Which layers lose more: the scores of each way to allocate, and the sparsities they give."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from farms_jax import allocate_sparsity, block_of, round_to_groups

from .blocks import Plan
from .config import EPSILONS_SCALE, EPSILONS_SHIFT, SPECTRAL, Allocation, Config
from .methods import Groups, wanda_scores
from .models import Network
from .select import lowest
from .walk import Statistics, Tensors, weights_of

OUTLIER = 5.0  # OWL's M: an outlier is so many times the mean


def shapes_of(network: Network) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every layer, by name, in network order."""
    shapes = {}
    for block in range(network.num_blocks):
        tensors = network.tensors(block)
        for linear in network.linears:
            layer = network.layer_name(block, linear)
            rows, columns = tensors[f"{layer}.weight"]
            shapes[layer] = (rows, columns)
    return shapes


def sizes_of(network: Network) -> dict[str, int]:
    """Return the number of weights of every layer, by name, in network order."""
    return {layer: rows * columns for layer, (rows, columns) in shapes_of(network).items()}


def depth_scores(network: Network) -> dict[str, float]:
    """Score every layer by the number of its block: an arithmetic progression of sparsities.

    Returns:
        Score by layer.

    References:
        Huang et al., Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective,
        ICML 2025 (ATP).
    """
    return {network.layer_name(b, linear): float(b) for b in range(network.num_blocks) for linear in network.linears}


def activation_scores(
    config: Config, network: Network, block: int, tensors: Tensors, squares: Statistics
) -> dict[str, float]:
    """Score the layers of a block by Wanda's scores in the dense model; high means unimportant.

    OWL takes minus the percentage of scores above five times their mean; DLP takes their median (its paper; its
    code takes the mean).

    Args:
        config: allocation and granularity: over the block together, or layer by layer.
        network: the model.
        block: number of the block.
        tensors: of the block.
        squares: statistics of `prune.walk`.

    Returns:
        Score by layer.

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity, ICML 2024; Chen et al., DLP: Dynamic Layerwise Pruning in
        Large Language Models, ICML 2025.
    """
    of = _outliers if config.allocation == "owl" else _median
    weights = weights_of(network, block, tensors)
    scores = {layer: wanda_scores(jnp.asarray(weight), squares[layer]) for layer, weight in weights.items()}
    if config.granularity == "layer":
        return {layer: float(of(score.ravel())) for layer, score in scores.items()}
    return dict.fromkeys(scores, float(of(jnp.concatenate([score.ravel() for score in scores.values()]))))


@jax.jit
def _outliers(scores: Array) -> Array:
    return -100 * (scores > OUTLIER * scores.mean()).mean(dtype=jnp.float32)


@jax.jit
def _median(scores: Array) -> Array:
    """Lower median, as in torch."""
    return jnp.where(lowest(scores, (scores.size - 1) // 2), scores, 0).max()


def epsilons(allocation: Allocation) -> tuple[float, ...]:
    """Return what `--epsilon auto` tries."""
    return EPSILONS_SCALE if allocation in SPECTRAL else EPSILONS_SHIFT


def sparsities(
    config: Config, scores: Mapping[str, float], sizes: Mapping[str, int], epsilon: float
) -> dict[str, float]:
    """Turn scores into the sparsity of each layer.

    Args:
        config: sparsity, allocation, granularity and budget.
        scores: by layer; not looked at for uniform.
        sizes: of the layers.
        epsilon: half the range.

    Returns:
        Sparsity by layer, in the order of `sizes`.
    """
    if config.allocation == "uniform":
        return dict.fromkeys(sizes, config.target)
    return allocate_sparsity(
        {layer: scores[layer] for layer in sizes},
        sparsity=config.target,
        epsilon=epsilon,
        block_of=block_of if config.granularity == "block" else None,
        num_params=sizes,
        rule="scale" if config.allocation in SPECTRAL else "shift",
        budget=config.budget,
    )


def plan_of(config: Config, sparsity: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> Plan:
    """Say how every layer is to be pruned.

    Under N:M with an allocation other than uniform, M is given and N follows from the layer's sparsity. Wanda removes
    a whole number of weights from every row. Both are rounded so that the global budget is kept; with the reference's
    budget Wanda rounds down, as the reference does.

    Args:
        config: method, groups, granularity and budget.
        sparsity: by layer.
        shapes: (out, in) of the layers.

    Returns:
        The plan.
    """
    sizes = {layer: rows * columns for layer, (rows, columns) in shapes.items()}
    pattern, groups = config.groups_of(), None
    if pattern and config.allocation == "uniform":
        groups = dict.fromkeys(sparsity, pattern)
    elif pattern:
        shared = block_of if config.granularity == "block" else None
        removed = round_to_groups(sparsity, sizes, group=pattern.size, block_of=shared)
        groups = {layer: Groups(count, pattern.size) for layer, count in removed.items()}
    elif config.method == "wanda" and config.budget == "exact":
        inputs = {layer: columns for layer, (_, columns) in shapes.items()}
        removed = round_to_groups(sparsity, sizes, group=inputs)
        sparsity = {layer: _fraction(count, inputs[layer]) for layer, count in removed.items()}
    return Plan(config.method, sparsity, groups, config.damping)


def _fraction(count: int, whole: int) -> float:
    """Returns the float that gives back the count: 29 / 100 * 100 is 28.999999999999996."""
    fraction = count / whole
    return fraction if int(whole * fraction) == count else math.nextafter(fraction, 1)
