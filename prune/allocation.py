"""From scores to a plan: the sparsity of each layer, or its N:M."""

import dataclasses
import math
from collections.abc import Mapping

from farms_jax import allocate_sparsity, block_of, round_to_groups

from .config import SPECTRAL, Config, Method
from .methods import Groups
from .recovery import Recovery

Shapes = Mapping[str, tuple[int, int]]  # (out, in) by layer

_BY_ROWS: tuple[Method, ...] = ("wanda", "admm")  # remove a whole number of weights from every row


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each layer is pruned."""

    method: Method
    sparsity: Mapping[str, float]  # by layer
    groups: Mapping[str, Groups] = dataclasses.field(default_factory=dict)  # N:M by layer, instead of its sparsity
    damping: float | None = None  # that is tried first, instead of the method's own
    recovery: Recovery | None = None  # training of each block after it is pruned

    def asked(self, layer: str) -> float:
        """Return the sparsity asked of a layer: N / M where it has groups."""
        return self.groups[layer].sparsity if layer in self.groups else self.sparsity[layer]


def sizes_of(shapes: Shapes) -> dict[str, int]:
    """Return the number of weights of every layer."""
    return {layer: rows * columns for layer, (rows, columns) in shapes.items()}


def units_of(config: Config, shapes: Shapes) -> dict[str, list[str]]:
    """Return the layers that share one sparsity: those of a block, by its name, or each alone, by its own."""
    units: dict[str, list[str]] = {}
    for layer in shapes:
        units.setdefault(block_of(layer) if config.granularity == "block" else layer, []).append(layer)
    return units


def sparsities(config: Config, scores: Mapping[str, float], shapes: Shapes, epsilon: float) -> dict[str, float]:
    """Return the sparsity of each layer, in the order of `shapes`; the uniform allocation needs no `scores`."""
    if config.allocation == "uniform":
        return dict.fromkeys(shapes, config.target)
    return allocate_sparsity(
        {layer: scores[layer] for layer in shapes},
        sparsity=config.target,
        epsilon=epsilon,
        block_of=block_of if config.granularity == "block" else None,
        num_params=sizes_of(shapes),
        rule="scale" if config.allocation in SPECTRAL else "shift",
        budget=config.budget,
    )


def plan_of(config: Config, sparsity: Mapping[str, float], shapes: Shapes) -> Plan:
    """Return the plan for these sparsities by layer.

    Under N:M with an allocation other than uniform, M is given and N follows from the layer's sparsity. Wanda and
    ADMM remove a whole number of weights from every row. Both are rounded so that the global budget is kept; with the
    reference's budget they round down, as Wanda's code does.
    """
    pattern, groups = config.groups_of(), {}
    if pattern and config.allocation == "uniform":
        groups = dict.fromkeys(sparsity, pattern)
    elif pattern:
        shared = block_of if config.granularity == "block" else None
        removed = round_to_groups(sparsity, sizes_of(shapes), group=pattern.size, block_of=shared)
        groups = {layer: Groups(count, pattern.size) for layer, count in removed.items()}
    elif config.method in _BY_ROWS and config.budget == "exact":
        inputs = {layer: columns for layer, (_, columns) in shapes.items()}
        removed = round_to_groups(sparsity, sizes_of(shapes), group=inputs)
        sparsity = {layer: count / inputs[layer] for layer, count in removed.items()}
        for layer, count in removed.items():
            if int(inputs[layer] * sparsity[layer]) < count:  # 29 / 100 * 100 is 28.999999999999996
                sparsity[layer] = math.nextafter(sparsity[layer], 1)
    return Plan(config.method, sparsity, groups, config.damping, config.recovery())
