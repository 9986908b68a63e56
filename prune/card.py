"""The results of a run: `run.json`, the card with all that the numbers depend on, and `layers.csv`."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farms_jax import block_of
from farms_jax.programs.environment import environment
from farms_jax.programs.files import atomic

from .allocation import Plan, Shapes
from .job import Job
from .perplexity import Perplexity
from .pruning import Simulation
from .record import Record
from .writing import WrittenBlock

_PACKAGES = ("farms-jax", "jax", "jaxlib", "numpy", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class LayerRow:
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
    damping: float | None  # that SparseGPT needed


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
            weights=rows * columns,
            score=scores.get(layer),
            alpha=alphas.get(layer),
            alpha_after=alphas_after.get(layer),
            sparsity=plan.asked(layer),
            groups="{}:{}".format(*plan.groups[layer]) if plan.groups else None,
            reached=reached[layer],
            damping=damping.get(layer),
        )
        for layer, (rows, columns) in shapes.items()
    ]


def write_layers(folder: Path, rows: Sequence[LayerRow]) -> None:
    """Write `layers.csv`."""
    with atomic(folder / "layers.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(LayerRow)])
        writer.writeheader()
        writer.writerows([dataclasses.asdict(row) for row in rows])


def make_card(
    job: Job,
    record: Record,
    rows: Sequence[LayerRow],
    blocks: Sequence[WrittenBlock],
    dense: Perplexity,
    uniform: Simulation | None,
    pruned: Perplexity,
) -> dict[str, Any]:
    """Return the content of `run.json`: everything that the numbers depend on, and the numbers."""
    trials = record.get("trials")
    epsilon = {"value": record.get("epsilon")} | ({"trials": trials} if trials else {})
    total = sum(row.weights for row in rows)
    reached = sum(row.weights * row.reached for row in rows) / total
    baseline = {"uniform": uniform} if uniform else {}
    perplexities = {"dense": dense.value} | {k: v.perplexity for k, v in baseline.items()} | {"pruned": pruned.value}
    return {
        **_provenance(job),
        "allocation": {
            "by": job.config.allocation,
            "granularity": job.config.granularity,
            "epsilon": epsilon,
            "layers": [dataclasses.asdict(row) for row in rows],
        },
        "sparsity": {"asked": job.config.sparsity, "reached": reached},
        "perplexity": perplexities,
        "nll_per_block": {name: found.nll for name, found in {"dense": dense, **baseline, "pruned": pruned}.items()},
        "uniform_sparsity": uniform.sparsity if uniform else None,
        "seconds": record.get("seconds"),
        "seconds_per_block": [block.seconds for block in blocks],
        "peak_memory_bytes": record.peak_memory(),
    }


def _provenance(job: Job) -> dict[str, Any]:
    """Return what the numbers depend on."""
    settings = {key: value for key, value in dataclasses.asdict(job.config).items() if key != "out"}
    return {
        "key": job.key,
        "settings": settings,
        "model": {
            "name": job.checkpoint.name,
            "source": job.config.model or "bundled",
            "tensors_sha256": job.weights,
            "config": job.checkpoint.config,
        },
        "tokenizer_sha256": job.evaluation.record.get("tokenizer_sha256"),
        "calibration": job.calibration.record,
        "evaluation": job.evaluation.record,
        **environment(*_PACKAGES),
    }
