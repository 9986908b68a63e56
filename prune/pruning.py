"""Pruning one block, and a whole model block by block: each is given what the pruned blocks before it put out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from .activations import Activations
from .allocation import Plan, sizes_of
from .calibration import Statistic, Statistics
from .config import Method
from .forward import Read, Tensors, embed, reader, run_blocks, weights_of
from .job import Job
from .methods import Groups, magnitude, wanda, wanda_variant
from .models import Network
from .perplexity import losses
from .sparsegpt import Factor, factorise, sparsegpt

STATISTIC: dict[Method, Statistic | None] = {
    "magnitude": None,
    "wanda": "squares",
    "wanda_variant": "squares",
    "sparsegpt": "hessian",
}


@dataclasses.dataclass(frozen=True)
class PrunedBlock:
    """A pruned block.

    Attributes:
        tensors: all tensors of the block, in their stored dtypes.
        masks: (out, in) bool of each layer, True where kept.
        damping: damping that the Hessian of each layer needed, under SparseGPT.
    """

    tensors: Tensors
    masks: dict[str, np.ndarray]
    damping: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A pruned model that was evaluated and not kept.

    Attributes:
        perplexity: exp of the mean of `nll`.
        sparsity: sparsity reached.
        nll: mean negative log-likelihood of each sequence, in nats.
    """

    perplexity: float
    sparsity: float
    nll: list[float]


def prune_block(network: Network, block: int, tensors: Tensors, statistics: Statistics, plan: Plan) -> PrunedBlock:
    """Prune the linears of a block; its other tensors stay.

    Args:
        network: the model.
        block: number of the block.
        tensors: tensors of the block, as stored.
        statistics: statistics of `prune.calibration` that the method needs.
        plan: what to do.

    Returns:
        The block as it will be stored: weights that SparseGPT changed are rounded to the stored dtype.

    Raises:
        InputError: a Hessian cannot be factorised.
    """
    pruned = PrunedBlock(dict(tensors), {}, {})
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
            pruned.damping[layer] = factor.damping
        else:
            mask = np.asarray(_mask(plan.method, jnp.asarray(weight), statistic, plan.sparsity[layer], groups))
            new = np.where(mask, weight, np.zeros((), weight.dtype))
        pruned.tensors[f"{layer}.weight"], pruned.masks[layer] = new, mask
    return pruned


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


def prune_blocks(
    network: Network,
    read: Read,
    plan: Plan,
    keep: Callable[[int, PrunedBlock], None],
    *,
    calibration: np.ndarray,
    evaluation: np.ndarray | None = None,
    spill: Path | None = None,
    title: str = "prune",
    first: int = 0,
) -> Activations:
    """Prune all blocks, one in memory at a time.

    Args:
        network: the model.
        read: returns the tensors of a part.
        plan: how to prune.
        keep: called with the number of each block and the block, pruned.
        calibration: tokens (M, T) that the statistics are of; not looked at by methods without any.
        evaluation: tokens (N, T) that travel behind the calibration.
        spill: folder to hold the activations instead of memory.
        title: title of the progress bar.
        first: blocks before this one are pruned already.

    Returns:
        Outputs of the last block; those of `evaluation` are the last ones.

    Raises:
        InputError: a Hessian cannot be factorised.
    """
    statistic = STATISTIC[plan.method]
    seen = calibration if statistic else calibration[:0]

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> Tensors:
        pruned = prune_block(network, block, tensors, statistics, plan)
        keep(block, pruned)
        return pruned.tensors

    activations = embed(network, read, seen if evaluation is None else np.concatenate([seen, evaluation]), spill)
    run_blocks(
        network,
        read,
        activations,
        title=title,
        visit=visit,
        statistic=statistic,
        calibration=len(seen),
        first=first,
    )
    return activations


def simulate(job: Job, plan: Plan, ids: np.ndarray, title: str) -> Simulation:
    """Prune without writing anything, and evaluate on the way: no pruned block is kept.

    Args:
        job: the run.
        plan: how to prune.
        ids: tokens (N, T) to evaluate on.
        title: title of the progress bar.

    Returns:
        What the pruned model came to.
    """
    removed = 0

    def count(block: int, pruned: PrunedBlock) -> None:
        nonlocal removed
        removed += sum(int((~mask).sum()) for mask in pruned.masks.values())

    network, read = job.network, reader(job.checkpoint.read, job.network)
    activations = prune_blocks(
        network, read, plan, count, calibration=job.seen, evaluation=ids, spill=job.config.spill, title=title
    )
    nll = losses(network, network.to_state("head", read("head")), activations, ids)
    total = sum(sizes_of(network.layer_shapes()).values())
    return Simulation(float(np.exp(nll.mean())), removed / total, nll.tolist())
