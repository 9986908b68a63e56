"""What a run says: the allocation before it, the results after it, and the card that holds everything."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax import block_of

from .blocks import Plan
from .job import Job

Row = dict[str, Any]


def wanted(plan: Plan, layer: str) -> float:
    """Return the sparsity that a plan asks of a layer: of its N:M where it has one."""
    if plan.groups:
        return plan.groups[layer].removed / plan.groups[layer].size
    return plan.sparsity[layer]


def allocation_table(
    job: Job, scores: Mapping[str, float], epsilon: float, plan: Plan, sizes: Mapping[str, int]
) -> str:
    """Show how much each block is to lose, and the size of what is left.

    Args:
        job: the run.
        scores: by layer, may be empty.
        epsilon: half the range of sparsities.
        plan: what is to be done.
        sizes: of the layers.

    Returns:
        A table, one line per block.
    """
    config, blocks = job.config, list(dict.fromkeys(map(block_of, sizes)))
    lines = [f"\n{'block':<28} {'score':>9} {'sparsity':>9}  " + ("lowest to highest" if _differ(plan, sizes) else "")]
    for block in blocks:
        layers = [layer for layer in sizes if block_of(layer) == block]
        total = sum(sizes[layer] for layer in layers)
        mean = sum(wanted(plan, layer) * sizes[layer] for layer in layers) / total
        score = f"{np.mean([scores[layer] for layer in layers]):9.3f}" if scores else " " * 9
        ends = [wanted(plan, layer) for layer in layers]
        spread = f"{min(ends):.3f} {max(ends):.3f}" if max(ends) > min(ends) else ""
        lines.append(f"{block:<28} {score} {mean:9.4f}  {spread}".rstrip())
    removed = sum(wanted(plan, layer) * size for layer, size in sizes.items())
    everything = sum(int(np.prod(info.shape)) for info in job.checkpoint.tensors.values())
    stored = sum(int(np.prod(info.shape)) * info.dtype.itemsize for info in job.checkpoint.tensors.values())
    width = stored / everything  # bytes of a number
    sparse = stored - removed * width + sum(sizes.values()) / 8
    how = f", epsilon {epsilon:g}, by {config.granularity}" if config.allocation != "uniform" else ""
    lines += [
        f"{config.allocation}{how}: {removed / sum(sizes.values()):.4f} of {sum(sizes.values()) / 1e6:.2f} M block "
        f"weights, {removed / everything:.4f} of all {everything / 1e6:.2f} M",
        f"size: {stored / 2**20:.1f} MiB dense; {sparse / 2**20:.1f} MiB with kept weights and one bit for each",
    ]
    return "\n".join(lines)


def _differ(plan: Plan, sizes: Mapping[str, int]) -> bool:
    by_block: dict[str, set[float]] = {}
    for layer in sizes:
        by_block.setdefault(block_of(layer), set()).add(wanted(plan, layer))
    return any(len(found) > 1 for found in by_block.values())


def layer_rows(
    sizes: Mapping[str, int],
    scores: Mapping[str, float],
    alphas: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    blocks: Sequence[Mapping[str, Any]],
) -> list[Row]:
    """Make the lines of `layers.csv`.

    Args:
        sizes: of the layers.
        scores: by layer, may be empty.
        alphas: measures before pruning, may be empty.
        after: measures after it.
        plan: what was asked for.
        blocks: facts of the pruned blocks.

    Returns:
        One row per layer; `None` where a number does not exist.
    """
    facts = {layer: row for block in blocks for layer, row in block["layers"].items()}
    return [
        {
            "block": block_of(layer),
            "layer": layer,
            "weights": size,
            "score": scores.get(layer),
            "alpha": alphas.get(layer, {}).get("alpha"),
            "alpha_after": after.get(layer, {}).get("alpha"),
            "sparsity": wanted(plan, layer),
            "groups": "{}:{}".format(*plan.groups[layer]) if plan.groups else None,
            "reached": facts[layer]["reached"],
            "damping": facts[layer].get("damping"),
        }
        for layer, size in sizes.items()
    ]


def make_card(
    job: Job, rows: Sequence[Row], results: Mapping[str, Any], seconds: Mapping[str, float], peak: int
) -> dict[str, Any]:
    """Make the content of `run.json`: everything that the numbers depend on, and the numbers.

    Args:
        job: the run.
        rows: of the layers.
        results: of the stages.
        seconds: of the stages.
        peak: bytes of memory.

    Returns:
        The card, JSON-ready.
    """
    total = sum(row["weights"] for row in rows)
    reached = sum(row["weights"] * row["reached"] for row in rows) / total
    return {
        **job.facts(),
        "allocation": {
            "by": job.config.allocation,
            "granularity": job.config.granularity,
            "epsilon": results["epsilon"],
            "layers": list(rows),
        },
        "sparsity": {"asked": job.config.sparsity, "reached": reached},
        "perplexity": {name: results[name]["perplexity"] for name in ("dense", "uniform", "pruned") if results[name]},
        "nll_per_block": {name: results[name]["nll"] for name in ("dense", "uniform", "pruned") if results[name]},
        "uniform_sparsity": results["uniform"]["sparsity"] if results["uniform"] else None,
        "seconds": dict(seconds),
        "seconds_per_block": [block["seconds"] for block in results["blocks"]],
        "peak_memory_bytes": peak,
    }


def summarise(card: Mapping[str, Any], path: Path, plots: Sequence[Path]) -> str:
    """Show the results of a run.

    Args:
        card: of the run.
        path: its directory.
        plots: made of it.

    Returns:
        A table, and where everything is.
    """
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
