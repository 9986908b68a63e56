"""Pruning one block, and a whole model block by block: each is given the outputs of the pruned ones before it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from .admm import Normal, admm, normalise
from .allocation import Plan, plan_of, sizes_of
from .config import DAMPING, Method
from .forward import Activations, NotFiniteError, Read, Statistic, Statistics, Tensors, embed, run_blocks, weights_of
from .job import Job
from .methods import magnitude, wanda, wanda_variant
from .models import Network
from .perplexity import losses, perplexity_of
from .recovery import recover_block
from .sparsegpt import Factor, factorise, sparsegpt

STATISTIC: dict[Method, Statistic | None] = {
    "magnitude": None,
    "wanda": "squares",
    "wanda_variant": "squares",
    "sparsegpt": "hessian",
    "admm": "hessian",
}
Factors = dict[int, Factor | Normal]  # by identity of the Hessian: layers that share an input share it
# By method with a Hessian: how to factorise it, and how to find the new weights and the mask.
_WITH_HESSIAN: dict[Method, tuple[Callable[..., Factor | Normal], Callable[..., tuple[Array, Array]]]] = {
    "sparsegpt": (factorise, sparsegpt),
    "admm": (normalise, admm),
}


@dataclasses.dataclass(frozen=True)
class PrunedBlock:
    """A pruned block."""

    tensors: Tensors  # all of the block, in their stored dtypes
    masks: dict[str, np.ndarray]  # (out, in) bool by layer, False where the weight is zero
    damping: dict[str, float]  # by layer: that its Hessian needed, where the method has one
    recovered: dict[str, float]  # by half that was trained: its error, relative to before


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Results of a pruned model that was not kept."""

    perplexity: float  # exp of the mean of `nll`
    sparsity: float  # reached
    nll: list[float]  # mean negative log-likelihood of each sequence, in nats


def prune_block(
    network: Network, block: int, tensors: Tensors, statistics: Statistics, plan: Plan, factors: Factors | None = None
) -> PrunedBlock:
    """Return a block with its linears pruned, as it will be stored: weights are rounded to the stored dtype.

    `tensors` are the block's, as stored; `statistics` those that the plan's method needs, see `STATISTIC`. `factors`
    keeps what was factorised of them, for another plan of the same method and damping. A Hessian that cannot be
    factorised is an InputError.
    """
    pruned = PrunedBlock(dict(tensors), {}, {}, {})
    factors = {} if factors is None else factors
    for layer, weight in weights_of(network, block, tensors).items():
        given, values = jnp.asarray(weight), weight
        sparsity, groups = plan.sparsity[layer], plan.groups.get(layer)
        if plan.method in _WITH_HESSIAN:
            prepare, solve = _WITH_HESSIAN[plan.method]
            hessian, damping = statistics[layer], plan.damping or DAMPING[plan.method]
            if id(hessian) not in factors:
                factors[id(hessian)] = factor = prepare(hessian, damping, layer)
                if factor.damping > damping:
                    tqdm.write(f"{layer}: the Hessian needed a damping of {factor.damping:g} instead of {damping:g}")
            pruned.damping[layer] = factors[id(hessian)].damping
            updated, kept = solve(given, factors[id(hessian)], sparsity, groups)
            values = np.asarray(updated).astype(weight.dtype)
        elif plan.method == "wanda":
            kept = wanda(given, statistics[layer], sparsity, groups)
        elif plan.method == "wanda_variant":
            kept = wanda_variant(given, statistics[layer], sparsity)
        else:
            kept = magnitude(given, sparsity, groups)
        written = np.where(np.asarray(kept), values, np.zeros((), weight.dtype))
        pruned.tensors[f"{layer}.weight"] = written
        # Not `kept`: weights may be zero from the start, or become so in a narrow dtype.
        pruned.masks[layer] = written != 0
    return pruned


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
    """Return the outputs of the last block, after all blocks were pruned, one in memory at a time.

    `keep` is called with the number of each block and the pruned block; those before `first` are pruned already. The
    statistics are of `calibration`, tokens (M, T), of no use where there are none and no recovery; `evaluation` (N, T)
    travels behind, so that its outputs are the last N. A Hessian that cannot be factorised is an InputError.
    """
    statistic = STATISTIC[plan.method]
    seen = calibration if statistic or plan.recovery else calibration[:0]

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> Tensors:
        pruned = prune_block(network, block, tensors, statistics, plan)
        if plan.recovery:
            found, errors = recover_block(
                network, block, tensors, pruned.tensors, pruned.masks, activations, len(seen), plan.recovery, spill
            )
            masks = {layer: found[f"{layer}.weight"] != 0 for layer in pruned.masks}
            pruned = dataclasses.replace(pruned, tensors=found, masks=masks, recovered=errors)
        keep(block, pruned)
        return pruned.tensors

    activations = embed(network, read, seen if evaluation is None else np.concatenate([seen, evaluation]), spill)
    run_blocks(
        network, read, activations, title=title, visit=visit, statistic=statistic, calibration=len(seen), first=first
    )
    return activations


def simulate(job: Job, plan: Plan, ids: np.ndarray, title: str) -> Simulation:
    """Prune without writing anything, and evaluate on tokens (N, T) on the way: no pruned block is kept.

    Returns:
        The pruned model's losses and sparsity.

    Raises:
        NotFiniteError: it has no perplexity.
    """
    removed = []

    def count(block: int, pruned: PrunedBlock) -> None:
        removed.extend(int((~mask).sum()) for mask in pruned.masks.values())

    network, read = job.network, job.checkpoint.read
    activations = prune_blocks(
        network, read, plan, count, calibration=job.seen, evaluation=ids, spill=job.config.spill, title=title
    )
    nll = losses(network, read, activations, ids)
    total = sum(sizes_of(network.layer_shapes()).values())
    return Simulation(perplexity_of(nll, title), sum(removed) / total, nll.tolist())


def judge(job: Job, sparsity: Mapping[str, float], title: str) -> float | None:
    """Return the perplexity on the held-out calibration text when layers are pruned to these sparsities.

    Without recovery, which would take far longer; `None` where it is not finite: too much is removed somewhere.
    """
    plan = plan_of(dataclasses.replace(job.config, recover="none"), sparsity, job.network.layer_shapes())
    try:
        return simulate(job, plan, job.unseen, title).perplexity
    except NotFiniteError:
        return None
