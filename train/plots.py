"""Plots of a run: learning curves, alpha and rate of every layer over epochs, the distribution of alpha."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SIZE = (10.0, 4.2)  # inches


def plot_run(run: Path, seeds: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]], title: str) -> list[Path]:
    """Draw the plots of a run.

    Args:
        run: directory to write to.
        seeds: per seed its `metrics.jsonl` and `layers.csv` rows.
        title: what was trained, on which data.

    Returns:
        The files: `learning_curves.png`, `layers.png` (paper, Figure 12, of the first seed) and `alphas.png`
        (Figure 5, of the last epoch).
    """
    _, layers = next(iter(seeds.values()))
    figures = {
        "learning_curves.png": _learning_curves({seed: metrics for seed, (metrics, _) in seeds.items()}, title),
        "layers.png": _layers(layers, title),
        "alphas.png": _alphas({seed: rows for seed, (_, rows) in seeds.items()}, title),
    }
    for name, figure in figures.items():
        figure.savefig(run / name, dpi=130)
    return [run / name for name in figures]


def _figure(title: str, columns: int) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        if columns > 1:  # epochs along the axis
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _learning_curves(metrics: dict[int, list[dict[str, Any]]], title: str) -> Figure:
    figure, (loss, accuracy) = _figure(title, 2)
    for index, (seed, rows) in enumerate(metrics.items()):
        epochs = [row["epoch"] + 1 for row in rows]
        for axis, measure in ((loss, "loss"), (accuracy, "accuracy")):
            factor = 100 if measure == "accuracy" else 1
            for part, style in (("train", "--"), ("test", "-")):
                values = [factor * row[f"{part}_{measure}"] for row in rows]
                axis.plot(epochs, values, style, marker=".", color=f"C{index}", label=f"{part}, seed {seed}")
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracy.legend(fontsize=8)
    return figure


def _layers(rows: list[dict[str, Any]], title: str) -> Figure:
    figure, (alpha, rate) = _figure(title, 2)
    names = list(dict.fromkeys(row["layer"] for row in rows))
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    for name, colour in zip(names, colours, strict=True):
        mine = [row for row in rows if row["layer"] == name]
        epochs = [row["epoch"] for row in mine]
        alpha.plot(epochs, [row["alpha"] or np.nan for row in mine], color=colour, lw=1.2, label=name)
        rate.plot(epochs[:-1], [row["learning_rate"] for row in mine[:-1]], color=colour, lw=1.2)
    alpha.set(xlabel="epoch", ylabel="alpha (PL_Alpha_Hill)")
    rate.set(xlabel="epoch", ylabel="learning rate")
    figure.legend(*alpha.get_legend_handles_labels(), loc="outside right center", fontsize=5.5)
    return figure


def _alphas(layers: dict[int, list[dict[str, Any]]], title: str) -> Figure:
    figure, (axis,) = _figure(title, 1)
    last = {seed: [r["alpha"] for r in rows if r["epoch"] == rows[-1]["epoch"]] for seed, rows in layers.items()}
    fitted = {seed: [alpha for alpha in alphas if alpha > 0] for seed, alphas in last.items()}
    axis.boxplot(list(fitted.values()), tick_labels=[f"seed {seed}" for seed in fitted], showmeans=True)
    for position, alphas in enumerate(fitted.values(), start=1):
        axis.plot(np.full(len(alphas), position), alphas, ".", color="C0", alpha=0.5)
    axis.set(ylabel="alpha of the layers after the last epoch")
    return figure
