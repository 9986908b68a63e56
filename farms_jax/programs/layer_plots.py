"""Figures that every program draws: alpha and rate of the layers over epochs, the distribution of alpha.

Rows are those of `layers.csv`, with `epoch`, `layer`, `alpha` and `learning_rate` (see `run_directory`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax._modules import network_order
from farms_jax._present import shorten
from farms_jax.programs.files import atomic

_DPI = 130
_NAMED_LAYERS = 12  # beside the colours; more would not be legible


def layer_history(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return alpha and learning rate of every layer over the epochs of one seed (paper, Figure 12).

    An alpha of 0, no tail, is a gap; the rates of the last epoch, in which nothing is trained, are left out.
    """
    drawing, (alpha, rate) = figure(title, 2)
    names = network_order(list(dict.fromkeys(row["layer"] for row in rows)))
    colours = mpl.colormaps["viridis"].resampled(len(names))
    for i, name in enumerate(names):
        colour = colours(i)
        mine = [row for row in rows if row["layer"] == name]
        epochs = [row["epoch"] for row in mine]
        alpha.plot(epochs, [row["alpha"] or np.nan for row in mine], color=colour, lw=1.2)
        rate.plot(epochs[:-1], [row["learning_rate"] for row in mine[:-1]], color=colour, lw=1.2)
    alpha.set(xlabel="epoch", ylabel="alpha (PL_Alpha_Hill)")
    rate.set(xlabel="epoch", ylabel="learning rate")
    # A bar of colours in network order: a legend of all layers would be too small to read.
    shown = range(0, len(names), -(-len(names) // _NAMED_LAYERS))
    scale = ScalarMappable(BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names)), colours)
    bar = drawing.colorbar(scale, ax=[alpha, rate], ticks=list(shown), pad=0.01)
    bar.ax.set_yticklabels([shorten(names[i], 32) for i in shown], fontsize="small")
    bar.ax.invert_yaxis()
    bar.ax.minorticks_off()
    return drawing


def alpha_distribution(runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Return the alphas of the layers after the last epoch, one box per run by label (paper, Figure 5).

    Layers without a tail are left out.
    """
    drawing, (axis,) = figure(title, 1, epochs=False)
    last = {label: [row["alpha"] for row in rows if row["epoch"] == rows[-1]["epoch"]] for label, rows in runs.items()}
    fitted = {label: [alpha for alpha in alphas if alpha > 0] for label, alphas in last.items()}
    axis.boxplot(list(fitted.values()), tick_labels=list(fitted), showmeans=True)
    for position, alphas in enumerate(fitted.values(), start=1):
        axis.plot(np.full(len(alphas), position), alphas, ".", color="C0", alpha=0.5)
    axis.set(ylabel="alpha of the layers after the last epoch")
    return drawing


def save(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Return the files of figures, by file name, `.png`; each is written atomically."""
    for name, drawing in figures.items():
        with atomic(folder / name) as part:
            drawing.savefig(part, dpi=_DPI, format="png")
    return [folder / name for name in figures]
