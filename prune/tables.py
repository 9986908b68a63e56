"""The tables that a run prints: the allocation before pruning, the results after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax import block_of

from .allocation import Plan, sizes_of
from .job import Job


def allocation_table(job: Job, scores: Mapping[str, float], epsilon: float, plan: Plan) -> str:
    """Return a table of each block's sparsity, and the size of the pruned model; `scores` may be empty."""
    sizes = sizes_of(job.network.layer_shapes())
    blocks: dict[str, list[str]] = {}
    for layer in sizes:
        blocks.setdefault(block_of(layer), []).append(layer)
    differ = any(len({plan.asked(layer) for layer in layers}) > 1 for layers in blocks.values())
    lines = [f"\n{'block':<28} {'score':>9} {'sparsity':>9}  " + ("lowest to highest" if differ else "")]
    for block, layers in blocks.items():
        asked = [plan.asked(layer) for layer in layers]
        total = sum(sizes[layer] for layer in layers)
        mean = sum(plan.asked(layer) * sizes[layer] for layer in layers) / total
        score = f"{np.mean([scores[layer] for layer in layers]):9.3f}" if scores else " " * 9
        spread = f"{min(asked):.3f} {max(asked):.3f}" if max(asked) > min(asked) else ""
        lines.append(f"{block:<28} {score} {mean:9.4f}  {spread}".rstrip())
    return "\n".join([*lines, *_totals(job, epsilon, plan, sizes)])


def _totals(job: Job, epsilon: float, plan: Plan, sizes: Mapping[str, int]) -> list[str]:
    config, tensors = job.config, job.checkpoint.tensors.values()
    inside, everything = sum(sizes.values()), sum(int(np.prod(info.shape)) for info in tensors)
    removed = sum(plan.asked(layer) * size for layer, size in sizes.items())
    stored = sum(int(np.prod(info.shape)) * info.dtype.itemsize for info in tensors)
    sparse = stored - removed * stored / everything + inside / 8  # kept weights, and a bit for each weight
    how = f", epsilon {epsilon:g}, by {config.granularity}" if config.allocation != "uniform" else ""
    return [
        f"{config.allocation}{how}: {removed / inside:.4f} of {inside / 1e6:.2f} M block weights, "
        f"{removed / everything:.4f} of all {everything / 1e6:.2f} M",
        f"size: {stored / 2**20:.1f} MiB dense; {sparse / 2**20:.1f} MiB with kept weights and one bit for each",
    ]


def results_table(card: Mapping[str, Any], path: Path, plots: Sequence[Path]) -> str:
    """Return a table of the results in the content of `run.json`, and the paths of all files."""
    found, settings = card["perplexity"], card["settings"]
    sparsities = {"dense": 0.0, "uniform": card["uniform_sparsity"], "pruned": card["sparsity"]["reached"]}
    evaluation = card["evaluation"]
    lines = [
        f"\nperplexity on {evaluation['source']} ({evaluation['count']} blocks of {evaluation['length']} tokens), "
        f"{settings['method']}",
        f"{'allocation':<14} {'sparsity':>9} {'perplexity':>11}",
    ]
    for name, value in found.items():
        label = settings["allocation"] if name == "pruned" else name
        lines.append(f"{label:<14} {sparsities[name]:9.4f} {value:11.4f}")
    lines += [
        f"time: {sum(card['seconds'].values()):.1f} s, of it pruning {sum(card['seconds_per_block']):.1f} s; "
        f"peak memory {card['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"model: {path / 'model'}",
        f"run: {path} (run.json, layers.csv, {', '.join(plot.name for plot in plots)})",
    ]
    return "\n".join(lines)
