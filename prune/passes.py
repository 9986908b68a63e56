"""What a run goes through a model for: to analyse it, to score layers, to prune without a trace, to prune and write."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from .allocation import activation_scores, depth_scores, shapes_of, sizes_of
from .analysis import Measures, alphas_of, measure
from .blocks import STATISTIC, Plan, prune_block
from .checkpoints import Checkpoint
from .config import SPECTRAL
from .job import Job
from .output import Output
from .perplexity import losses
from .rundir import RunDirectory
from .walk import Part, Statistics, Tensors, embed, reader, walk

_AFTER = ("blocks", "pruned", "alphas after", "card")  # stages that are of the pruned model


def analyse(job: Job, checkpoint: Checkpoint, title: str) -> Measures:
    """Analyse the spectra of all layers, where the allocation goes by them.

    Args:
        job: says how; its network is the model's.
        checkpoint: the model, dense or pruned.
        title: of the progress bar.

    Returns:
        `LayerReport.to_dict` of every layer; nothing under other allocations.
    """
    config = job.config
    if config.allocation not in SPECTRAL:
        return {}
    window = config.window(min(min(shape) for shape in shapes_of(job.network).values()))
    read = reader(checkpoint.read, job.network)
    return measure(job.network, read, window, config.tail(), config.out / "cache" / "alphas", title)


def score(job: Job, measures: Measures | None = None) -> dict[str, float]:
    """Score all layers of the dense model as the allocation asks for it.

    Args:
        job: what is to be pruned.
        measures: of `analyse`, where it has been done; looked at by the allocations that go by spectra alone.

    Returns:
        Score by layer; nothing for uniform.
    """
    allocation = job.config.allocation
    if allocation in SPECTRAL:
        found = analyse(job, job.checkpoint, f"{allocation} scores") if measures is None else measures
        return alphas_of(found, sizes_of(job.network))
    if allocation == "atp":
        return depth_scores(job.network)
    return _score_by_activations(job) if allocation in {"owl", "dlp"} else {}


def _score_by_activations(job: Job) -> dict[str, float]:
    """Walks the calibration text through the dense model."""
    scores: dict[str, float] = {}

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> None:
        scores.update(activation_scores(job.config, job.network, block, tensors, statistics))

    read = reader(job.checkpoint.read, job.network)
    activations = embed(job.network, read, job.seen, job.config.spill)
    title = f"{job.config.allocation} scores"
    walk(job.network, read, activations, title=title, visit=visit, statistic="squares", calibration=len(activations))
    return scores


def simulate(job: Job, plan: Plan, ids: np.ndarray, title: str) -> dict[str, Any]:
    """Prune without writing anything, and evaluate on the way: no pruned block is kept.

    The sequences to evaluate travel behind those of the calibration, which alone give the statistics.

    Args:
        job: what to prune.
        plan: how.
        ids: (N, T) tokens to evaluate.
        title: of the progress bar.

    Returns:
        `perplexity`, the `sparsity` reached, `seconds`, and `nll` of each sequence.
    """
    start, removed = time.perf_counter(), 0

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> Tensors:
        nonlocal removed
        pruned = prune_block(job.network, block, tensors, statistics, plan)
        removed += sum(int((~mask).sum()) for mask in pruned.masks.values())
        return pruned.tensors

    read, statistic = reader(job.checkpoint.read, job.network), STATISTIC[plan.method]
    seen = job.seen if statistic else job.seen[:0]
    activations = embed(job.network, read, np.concatenate([seen, ids]), job.config.spill)
    walk(job.network, read, activations, title=title, visit=visit, statistic=statistic, calibration=len(seen))
    nll = losses(job.network, job.network.to_state("head", read("head")), activations, ids, len(seen))
    total = sum(int(np.prod(shape)) for shape in shapes_of(job.network).values())
    return {
        "perplexity": float(np.exp(nll.mean())),
        "sparsity": removed / total,
        "seconds": time.perf_counter() - start,
        "nll": nll.tolist(),
    }


def lay_out(job: Job, directory: RunDirectory) -> Output | None:
    """Take the space that the pruned model needs, and write all that no block holds.

    What an earlier run wrote is read again and kept up to the first block that is not as it was written.

    Args:
        job: what is to be pruned.
        directory: where the model goes. Its record of written blocks is cut to those that are there.

    Returns:
        The output; `None` where the model is finished.

    Raises:
        InputError: the disk is full, or the finished model is not as it was written.
    """
    given = job.tokenizer if job.config.tokenizer else None
    output = Output(directory.path / "model", job.checkpoint, shapes_of(job.network), given)
    if output.finished and len(directory.get("written", [])) == job.network.num_blocks:
        output.check()
        return None
    if not output.begun:
        directory.forget("outside", "written", *_AFTER)
    for path in output.lay_out(keep=bool(directory.get("written"))):
        _warn(f"{path} was missing or cut off; what is lost is made again")
    _copy_outside(job, directory, output)
    written = directory.get("written", [])
    good = _whole_blocks(job, written, output)
    if good < len(written):
        _warn(f"{directory.path / 'model.part'}: block {good} is not as it was written; pruning goes on from there")
        directory.forget(*_AFTER)
    directory.put("written", written[:good])
    return output


def _copy_outside(job: Job, directory: RunDirectory, output: Output) -> None:
    """Copy the tensors that no block holds, where they are not there from an earlier run."""
    inside = {name for block in range(job.network.num_blocks) for name in job.network.tensors(block)}
    outside = [name for name in job.checkpoint.tensors if name not in inside]
    sums = directory.get("outside")
    if sums is None or not all(output.holds([name], sum_) for name, sum_ in zip(outside, sums, strict=True)):
        directory.put("outside", output.copy(outside, job.checkpoint))


def _whole_blocks(job: Job, written: Sequence[Mapping[str, Any]], output: Output) -> int:
    """Count the written blocks before the first that is damaged."""
    with tqdm(written, desc="check blocks", unit="block", leave=False, disable=not written) as bar:
        for block, record in enumerate(bar):
            if not output.holds([*job.network.tensors(block), *record["layers"]], record["sha256"]):
                return block
    return len(written)


def _warn(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def write(job: Job, plan: Plan, directory: RunDirectory, output: Output) -> list[dict[str, Any]]:
    """Prune, and write every block when it is done; go on after those that an earlier run wrote.

    Args:
        job: what to prune.
        plan: how.
        directory: where it is recorded which blocks are written.
        output: of `lay_out`.

    Returns:
        Per block its number, `seconds`, `sha256`, and per layer the sparsity reached and the like.

    Raises:
        InputError: the disk is full, or a Hessian cannot be factorised; what is written stays.
    """
    done, last = list(directory.get("written", [])), time.perf_counter()
    if done:
        tqdm.write(f"going on: {len(done)} of {job.network.num_blocks} blocks are written")

    def read(part: Part) -> Tensors:
        source = output if isinstance(part, int) and part < len(done) else job.checkpoint
        return {name: source.read(name) for name in job.network.tensors(part)}

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> Tensors:
        nonlocal last
        pruned = prune_block(job.network, block, tensors, statistics, plan)
        sha256 = output.write(pruned.tensors, pruned.masks)
        now = time.perf_counter()
        done.append({"block": block, "seconds": now - last, "layers": pruned.facts, "sha256": sha256})
        directory.put("written", done)
        last = now
        return pruned.tensors

    statistic = STATISTIC[plan.method]
    seen = job.seen if statistic else job.seen[:0]
    activations = embed(job.network, read, seen, job.config.spill)
    walk(
        job.network,
        read,
        activations,
        title="prune",
        visit=visit,
        statistic=statistic,
        calibration=len(seen),
        first=len(done),
    )
    output.finish()
    return done
