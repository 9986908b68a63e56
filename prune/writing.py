"""Writing the pruned model block by block, so that a run that was stopped resumes after the last good block."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .allocation import Plan
from .fine_tuning import fine_tune
from .job import Job
from .output import Output
from .pruning import PrunedBlock, prune_blocks
from .record import Record

_AFTER = ("blocks", "pruned", "alphas after", "card")  # stages that read the pruned model


@dataclasses.dataclass(frozen=True)
class WrittenBlock:
    """The record of a block that is on disk."""

    sha256: str  # of its tensors and masks
    seconds: float  # since the block before it
    reached: dict[str, float]  # sparsity by layer
    damping: dict[str, float]  # that the Hessian of each layer needed, where the method has one
    recovered: dict[str, float]  # by half that was trained: its error, relative to before


def written_blocks(record: Record) -> list[WrittenBlock]:
    """Return the blocks that are on disk, from the first on."""
    return [WrittenBlock(**block) for block in record.get("written", [])]


def lay_out(job: Job, record: Record) -> Output | None:
    """Return the output, with space for the whole model and all tensors outside the blocks; `None`: it is finished.

    Blocks of an earlier run are read again and kept up to the first that is not as it was written; the record is cut
    to them. A full disk, or a finished model that is not as it was written, is an InputError.
    """
    given = job.tokenizer if job.config.tokenizer else None
    output = Output(record.path / "model", job.checkpoint, job.network.layer_shapes(), given)
    if output.finished and len(written_blocks(record)) == job.network.num_blocks:
        output.check()
        return None
    if not output.begun:
        record.forget("outside", "written", "trained", *_AFTER)
    for path in output.lay_out(keep=bool(written_blocks(record))):
        _warn(f"{path} was missing or cut off; what is lost is made again")
    inside = {name for block in range(job.network.num_blocks) for name in job.network.tensors(block)}
    outside = [name for name in job.checkpoint.tensors if name not in inside]
    sums = record.get("outside")
    if sums is None or not all(output.holds([name], sum_) for name, sum_ in zip(outside, sums, strict=True)):
        record.put("outside", [output.write({name: job.checkpoint.read(name)}) for name in outside])
    written = written_blocks(record)
    good = _count_good(job, written, output)
    if record.get("trained"):
        # It was stopped while trained weights took the place of those that they were trained from.
        good = 0
        record.forget("trained", *_AFTER)
    elif good < len(written):
        _warn(f"{record.path / 'model.part'}: block {good} is not as it was written; pruning goes on from there")
        record.forget(*_AFTER)
    record.put("written", written[:good])
    return output


def _count_good(job: Job, written: list[WrittenBlock], output: Output) -> int:
    """Count the written blocks before the first that is damaged."""
    with tqdm(written, desc="check blocks", unit="block", leave=False, disable=not written) as bar:
        for number, block in enumerate(bar):
            if not output.holds([*job.network.tensors(number), *block.reached], block.sha256):
                return number
    return len(written)


def _warn(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def write_pruned(job: Job, plan: Plan, record: Record, output: Output | None) -> None:
    """Prune, and write and record every block when it is done, after those of an earlier run.

    `output` is from `lay_out`. A full disk, or a Hessian that cannot be factorised, is an InputError; written blocks
    stay.
    """
    if output is None:
        return
    done, last = written_blocks(record), time.perf_counter()
    first = len(done)
    if done:
        tqdm.write(f"going on: {first} of {job.network.num_blocks} blocks are written")
    written = {name for block in range(first) for name in job.network.tensors(block)}

    def read(name: str) -> np.ndarray:
        return (output if name in written else job.checkpoint).read(name)

    def keep(block: int, pruned: PrunedBlock) -> None:
        nonlocal last
        sha256 = output.write(pruned.tensors, pruned.masks)
        now = time.perf_counter()
        reached = {layer: float(1 - mask.mean()) for layer, mask in pruned.masks.items()}
        done.append(WrittenBlock(sha256, now - last, reached, pruned.damping, pruned.recovered))
        record.put("written", done)
        last = now

    prune_blocks(job.network, read, plan, keep, calibration=job.seen, spill=job.config.spill, first=first)
    state = record.path / "training.npz"
    _train(job, record, output, state)
    output.finish()
    state.unlink(missing_ok=True)


def _train(job: Job, record: Record, output: Output, state: Path) -> None:
    """Train the written model as a whole, where that is asked for, and write it anew; `state` is kept on the way."""
    tuning, network, done = job.config.fine_tuning(), job.network, written_blocks(record)
    if tuning is None or job.training is None:
        return
    inside = {name for block in range(network.num_blocks) for name in network.tensors(block)}

    def read(name: str) -> np.ndarray:
        return (output if name in inside else job.checkpoint).read(name)

    masks = {layer: output.read(f"{layer}.weight") != 0 for layer in network.layer_shapes()}
    for block, found in fine_tune(network, read, masks, job.training.ids, tuning, state):
        if not record.get("trained"):
            record.put("trained", True)
        tensors = {name: read(name) for name in network.tensors(block)}
        tensors |= {name: values.astype(tensors[name].dtype) for name, values in found.items()}
        now = {layer: tensors[f"{layer}.weight"] != 0 for layer in done[block].reached}
        reached = {layer: float(1 - mask.mean()) for layer, mask in now.items()}
        done[block] = dataclasses.replace(done[block], sha256=output.write(tensors, now), reached=reached)
    record.put("written", done)
