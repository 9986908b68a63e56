"""Plots of a pruning run: sparsity of each block, alpha of each layer before and after."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from farms_jax.programs import layer_plots

from .card import LayerRow


def plot_run(run: Path, rows: Sequence[LayerRow], title: str) -> list[Path]:
    """Draw the plots of a run.

    Args:
        run: directory to write to.
        rows: one per layer.
        title: what was pruned, and how.

    Returns:
        The files: `sparsity.png` (paper, Figure 13) and, where alphas were measured, `alphas.png` (Figure 10).
    """
    figures = {"sparsity.png": _sparsity(rows, title)}
    if rows[0].alpha_after is not None:
        figures["alphas.png"] = _alphas(rows, title)
    return layer_plots.save(run, figures)


def _sparsity(rows: Sequence[LayerRow], title: str) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    blocks: dict[str, list[LayerRow]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    asked = [_mean(inside, [row.sparsity for row in inside]) for inside in blocks.values()]
    reached = [_mean(inside, [row.reached for row in inside]) for inside in blocks.values()]
    axis.plot(asked, "-", marker=".", label="asked")
    axis.plot(reached, ":", label="reached")
    ends = [[row.sparsity for row in inside] for inside in blocks.values()]
    axis.fill_between(range(len(blocks)), [min(e) for e in ends], [max(e) for e in ends], alpha=0.2, lw=0)
    axis.axhline(_mean(rows, [row.sparsity for row in rows]), color="gray", lw=0.8, label="all blocks")
    axis.set(xlabel="block", ylabel="fraction of weights removed", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def _mean(rows: Sequence[LayerRow], values: Sequence[float]) -> float:
    return float(np.average(values, weights=[row.weights for row in rows]))


def _alphas(rows: Sequence[LayerRow], title: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for values, label in (([row.alpha for row in rows], "dense"), ([row.alpha_after for row in rows], "pruned")):
        axis.plot([value or np.nan for value in values], ".-", lw=0.8, ms=4, label=label)  # 0: no tail
    starts = [i for i, row in enumerate(rows) if i == 0 or row.block != rows[i - 1].block]
    step = max(1, len(starts) // 16)
    axis.set_xticks(starts[::step], [str(i) for i in range(0, len(starts), step)])
    axis.set(xlabel="layers, by block", ylabel="alpha", title=title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure
