"""What a run reports: a table of the allocation; after pruning `run.json`, `layers.csv` and a table of the results."""

import csv
import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax import block_of
from farms_jax.programs.environment import environment, processor
from farms_jax.programs.files import atomic

from .allocation import Plan, Shapes, sizes_of
from .command import command_line
from .comparison import compare, perplexity_interval
from .config import EPSILON
from .job import Job
from .perplexity import Perplexity
from .precision import dtype_names
from .pruning import Simulation
from .record import Record
from .search import report as search_report
from .writing import WrittenBlock

ZEROS = (
    "Its zeros are stored like any number, so it is neither smaller nor faster than the dense model. Faster: N:M on "
    "hardware that has it (2:4 on NVIDIA GPUs, in a library with kernels for it), unstructured sparsity in runtimes "
    "made for it, such as MACKO. Smaller: compressed formats, such as the kept weights with a bit for each."
)
_PACKAGES = ("farms-jax", "jax", "jaxlib", "numpy", "transformers", "tokenizers")


class LayerRow(NamedTuple):
    """A line of `layers.csv`; `None` where a number does not exist."""

    block: str
    layer: str
    weights: int  # how many
    score: float | None  # that the sparsity follows from
    alpha: float | None  # before pruning, 0 where there is no tail
    alpha_after: float | None
    sparsity: float  # asked for
    groups: str | None  # N:M
    reached: float  # sparsity
    damping: float | None  # that the Hessian needed


def allocation_table(job: Job, scores: Mapping[str, float], epsilon: float, plan: Plan) -> str:
    """Return a table of each block's sparsity, and the size of the pruned model; `scores` may be empty."""
    config, tensors = job.config, job.checkpoint.tensors.values()
    sizes = sizes_of(job.network.layer_shapes())
    blocks = {block: list(layers) for block, layers in itertools.groupby(sizes, block_of)}
    differ = any(len({plan.asked(layer) for layer in layers}) > 1 for layers in blocks.values())
    lines = [f"\n{'block':<28} {'score':>9} {'sparsity':>9}  " + ("lowest to highest" if differ else "")]
    for block, layers in blocks.items():
        asked = [plan.asked(layer) for layer in layers]
        mean = np.average(asked, weights=[sizes[layer] for layer in layers])
        score = f"{np.mean([scores[layer] for layer in layers]):9.3f}" if scores else " " * 9
        spread = f"{min(asked):.3f} {max(asked):.3f}" if max(asked) > min(asked) else ""
        lines.append(f"{block:<28} {score} {mean:9.4f}  {spread}".rstrip())
    inside, everything = sum(sizes.values()), sum(math.prod(info.shape) for info in tensors)
    removed, stored = sum(plan.asked(layer) * sizes[layer] for layer in sizes), sum(info.nbytes for info in tensors)
    sparse = stored - removed * stored / everything + inside / 8  # kept weights, and a bit for each weight
    spread = f", epsilon {epsilon:g}" if config.allocation in EPSILON else ""
    how = f"{spread}, by {config.granularity}" if config.allocation != "uniform" else ""
    lines += [
        f"{config.allocation}{how}: {removed / inside:.4f} of {inside / 1e6:.2f} M block weights, "
        f"{removed / everything:.4f} of all {everything / 1e6:.2f} M",
        f"size: {stored / 2**20:.1f} MiB in {dtype_names(job.checkpoint)}, zeros and all; "
        f"{sparse / 2**20:.1f} MiB with kept weights and one bit for each",
    ]
    return "\n".join(lines)


def layer_rows(
    shapes: Shapes,
    plan: Plan,
    scores: Mapping[str, float],
    alphas: Mapping[str, float],
    alphas_after: Mapping[str, float],
    blocks: Sequence[WrittenBlock],
) -> list[LayerRow]:
    """Return the lines of `layers.csv`, one per layer; scores and alphas, by layer, may be empty."""
    reached = {layer: value for block in blocks for layer, value in block.reached.items()}
    damping = {layer: value for block in blocks for layer, value in block.damping.items()}
    return [
        LayerRow(
            block=block_of(layer),
            layer=layer,
            weights=size,
            score=scores.get(layer),
            alpha=alphas.get(layer),
            alpha_after=alphas_after.get(layer),
            sparsity=plan.asked(layer),
            groups="{}:{}".format(*plan.groups[layer]) if plan.groups else None,
            reached=reached[layer],
            damping=damping.get(layer),
        )
        for layer, size in sizes_of(shapes).items()
    ]


def write_layers(folder: Path, rows: Sequence[LayerRow]) -> None:
    """Write `layers.csv`."""
    with atomic(folder / "layers.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LayerRow._fields, *rows])


def make_card(
    job: Job,
    record: Record,
    rows: Sequence[LayerRow],
    blocks: Sequence[WrittenBlock],
    dense: Perplexity,
    baselines: Mapping[str, Simulation],
    pruned: Perplexity,
) -> dict[str, Any]:
    """Return the content of `run.json`: everything that the numbers depend on, and the numbers."""
    config, trials = job.config, record.get("trials")
    reached = sum(row.weights * row.reached for row in rows) / sum(row.weights for row in rows)
    perplexities = {"dense": dense.value} | {k: v.perplexity for k, v in baselines.items()} | {"pruned": pruned.value}
    nll = {name: found.nll for name, found in {"dense": dense, **baselines, "pruned": pruned}.items()}
    return {
        "key": job.key,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line(config),
        "settings": {key: value for key, value in dataclasses.asdict(config).items() if key != "out"},
        "model": {
            "name": job.checkpoint.name,
            "source": config.model or "bundled",
            "tensors_sha256": job.weights,
            "config": job.checkpoint.config,
        },
        "tokenizer_sha256": job.evaluation.record.get("tokenizer_sha256"),
        "calibration": job.calibration.record,
        "evaluation": job.evaluation.record,
        "dtype": {"written": dtype_names(job.checkpoint), "reason": job.precision.reason},
        "training": job.training.record if job.training else None,
        **environment(*_PACKAGES),
        "processor": processor(),
        "allocation": {
            "by": config.allocation,
            "granularity": config.granularity,
            "epsilon": {"value": record.get("epsilon")} | ({"trials": trials} if trials else {}),
            "layers": [row._asdict() for row in rows],
            **({"search": found} if (found := search_report(record)) else {}),
        },
        "sparsity": {"asked": config.sparsity, "reached": reached},
        "baseline_sparsity": {name: found.sparsity for name, found in baselines.items()},
        "perplexity": perplexities,
        "perplexity_interval": {name: perplexity_interval(losses)._asdict() for name, losses in nll.items()},
        # Fractions by which the perplexity of the written model is above the others'.
        "against": {name: compare(nll["pruned"], losses)._asdict() for name, losses in nll.items() if name != "pruned"},
        "nll_per_block": nll,
        "seconds": record.get("seconds"),
        "recovered_per_block": [block.recovered for block in blocks],
        "seconds_per_block": [block.seconds for block in blocks],
        "peak_memory_bytes": record.peak_memory(),
    }


class PerplexityRow(NamedTuple):
    """A model whose perplexity was measured."""

    allocation: str
    sparsity: float  # reached
    perplexity: float
    low: float  # ends of its 95 % interval
    high: float


def perplexity_rows(card: Mapping[str, Any]) -> list[PerplexityRow]:
    """Return what the content of `run.json` says of each model: dense, the baselines, and last the written one."""
    sparsities = {"dense": 0.0, **card["baseline_sparsity"], "pruned": card["sparsity"]["reached"]}
    ends, own = card["perplexity_interval"], card["settings"]["allocation"]
    return [
        PerplexityRow(own if k == "pruned" else k, sparsities[k], value, ends[k]["low"], ends[k]["high"])
        for k, value in card["perplexity"].items()
    ]


def results_table(card: Mapping[str, Any], path: Path, plots: Sequence[Path]) -> str:
    """Return a table of the results in the content of `run.json`, and the paths of all files."""
    settings, evaluation, blocks = card["settings"], card["evaluation"], card["evaluation"]["count"]
    lines = [
        f"\nperplexity on {evaluation['source']} ({blocks} blocks of {evaluation['length']} tokens), "
        f"{settings['method']}",
        f"{'allocation':<14} {'sparsity':>9} {'perplexity':>11}  {'95 % interval' if blocks > 1 else ''}".rstrip(),
    ]
    for row in perplexity_rows(card):
        interval = f"{row.low:.2f} to {row.high:.2f}" if blocks > 1 else ""
        lines.append(f"{row.allocation:<14} {row.sparsity:9.4f} {row.perplexity:11.4f}  {interval}".rstrip())
    for name, change in card["against"].items():
        told = f"this run against {name}: {100 * change['value']:+.1f} % perplexity"
        if blocks > 1:
            ends = f"{100 * change['low']:+.1f} to {100 * change['high']:+.1f} %"
            told += f", 95 % interval {ends}, paired over {blocks} blocks"
        lines.append(told)
    lines += [
        f"time: {sum(card['seconds'].values()):.1f} s, of it pruning {sum(card['seconds_per_block']):.1f} s; "
        f"peak memory {card['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"model: {path / 'model'} ({card['dtype']['written']})",
        f"  {ZEROS}",
        f"run: {path} (run.json, layers.csv, {', '.join(plot.name for plot in plots)})",
    ]
    return "\n".join(lines)
