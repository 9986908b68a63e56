"""Plots of a pruning run: sparsity of each block, alpha of each layer before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from farms_jax.programs import layer_plots


def plot_run(run: Path, rows: Sequence[dict[str, Any]], title: str) -> list[Path]:
    """Draw the plots of a run.

    Args:
        run: directory to write to.
        rows: of `layers.csv`.
        title: what was pruned, and how.

    Returns:
        The files: `sparsity.png` (paper, Figure 13) and, where alphas were measured, `alphas.png` (Figure 10).
    """
    figures = {"sparsity.png": _sparsity(rows, title)}
    if rows[0]["alpha_after"] is not None:
        figures["alphas.png"] = _alphas(rows, title)
    return layer_plots.save(run, figures)


def _sparsity(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    for measure, style in (("sparsity", "-"), ("reached", ":")):
        means = []
        for block in blocks:
            inside = [row for row in rows if row["block"] == block]
            means.append(np.average([row[measure] for row in inside], weights=[row["weights"] for row in inside]))
        axis.plot(means, style, marker="." if style == "-" else "", label="asked" if style == "-" else "reached")
    ends = [[row["sparsity"] for row in rows if row["block"] == block] for block in blocks]
    axis.fill_between(range(len(blocks)), [min(e) for e in ends], [max(e) for e in ends], alpha=0.2, lw=0)
    mean = np.average([row["sparsity"] for row in rows], weights=[row["weights"] for row in rows])
    axis.axhline(float(mean), color="gray", lw=0.8, label="all blocks")
    axis.set(xlabel="block", ylabel="fraction of weights removed", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def _alphas(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for measure, label in (("alpha", "dense"), ("alpha_after", "pruned")):
        values = [row[measure] or np.nan for row in rows]  # 0: no tail
        axis.plot(values, ".-", lw=0.8, ms=4, label=label)
    starts = [i for i, row in enumerate(rows) if i == 0 or row["block"] != rows[i - 1]["block"]]
    step = max(1, len(starts) // 16)
    axis.set_xticks(starts[::step], [str(i) for i in range(0, len(starts), step)])
    axis.set(xlabel="layers, by block", ylabel="alpha", title=title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure
