"""Plots of a pruning run: sparsity of each block, alpha of each layer before and after."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax.programs import layer_plots

from .results import LayerRow


def plot_run(run: Path, rows: Sequence[LayerRow], title: str) -> list[Path]:
    """Draw `sparsity.png` (paper, Figure 13) and, where alphas were measured, `alphas.png` (Figure 10) into a run."""
    figures = {"sparsity.png": _sparsity(rows, title)}
    if rows[0].alpha_after is not None:
        figures["alphas.png"] = _alphas(rows, title)
    return layer_plots.save(run, figures)


def _sparsity(rows: Sequence[LayerRow], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, size=(8, 4))
    blocks = [list(block) for _, block in itertools.groupby(rows, lambda row: row.block)]
    axis.plot([_mean(block, "sparsity") for block in blocks], "-", marker=".", label="asked")
    axis.plot([_mean(block, "reached") for block in blocks], ":", label="reached")
    ranges = [[row.sparsity for row in block] for block in blocks]
    axis.fill_between(range(len(blocks)), [*map(min, ranges)], [*map(max, ranges)], alpha=0.2, lw=0)
    axis.axhline(_mean(rows, "sparsity"), color="gray", lw=0.8, label="all blocks")
    axis.set(xlabel="block", ylabel="fraction of weights removed")
    axis.legend(fontsize=8)
    return drawing


def _mean(rows: Sequence[LayerRow], field: Literal["sparsity", "reached"]) -> float:
    return float(np.average([getattr(row, field) for row in rows], weights=[row.weights for row in rows]))


def _alphas(rows: Sequence[LayerRow], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, epochs=False, size=(10, 4))
    for values, label in (([row.alpha for row in rows], "dense"), ([row.alpha_after for row in rows], "pruned")):
        axis.plot([value or np.nan for value in values], ".-", lw=0.8, ms=4, label=label)  # 0: no tail
    starts = [i for i, row in enumerate(rows) if i == 0 or row.block != rows[i - 1].block]
    step = max(1, len(starts) // 16)
    axis.set_xticks(starts[::step], [str(i) for i in range(0, len(starts), step)])
    axis.set(xlabel="layers, by block", ylabel="alpha")
    axis.legend(fontsize=8)
    return drawing
