"""Plots of a pruning run: sparsity of each block, perplexities, alpha of each layer before and after."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax.programs import layer_plots

from .results import LayerRow, PerplexityRow

_SEEN = 0.005  # a difference of sparsities that the eye can tell
_NAMED = 8  # alphas beyond the axis whose values still fit


def plot_run(run: Path, rows: Sequence[LayerRow], perplexities: Sequence[PerplexityRow], title: str) -> list[Path]:
    """Draw into a run `sparsity.png` (paper, Figure 13), `perplexity.png` and, of alphas, `alphas.png` (Figure 10)."""
    figures = {"sparsity.png": _sparsity(rows, title), "perplexity.png": _perplexity(perplexities, title)}
    if rows[0].alpha_after is not None:
        figures["alphas.png"] = _alphas(rows, title)
    return layer_plots.save(run, figures)


def _sparsity(rows: Sequence[LayerRow], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, size=(8, 4))
    blocks = [list(block) for _, block in itertools.groupby(rows, lambda row: row.block)]
    asked, reached = (np.array([_mean(block, field) for block in blocks]) for field in ("sparsity", "reached"))
    axis.plot(reached, "-", marker=".", label="reached")
    differ = np.abs(asked - reached) > _SEEN
    if differ.any():  # else one line would hide the other
        axis.plot(np.flatnonzero(differ), asked[differ], "x", color="C1", label="asked")
    ranges = [[row.reached for row in block] for block in blocks]
    low, high = np.array([*map(min, ranges)]), np.array([*map(max, ranges)])
    if (high - low > _SEEN).any():
        axis.fill_between(range(len(blocks)), low, high, alpha=0.2, lw=0, label="lowest to highest layer")
    axis.axhline(mean := _mean(rows, "reached"), color="gray", lw=0.8, label="all blocks")
    lowest, highest = axis.get_ylim()
    axis.set_ylim(
        min(lowest, mean - 0.05), max(highest, mean + 0.05)
    )  # else the rounding of a uniform one would fill it
    axis.set(xlabel="block", ylabel="fraction of weights removed")
    axis.legend(fontsize=8)
    return drawing


def _mean(rows: Sequence[LayerRow], field: Literal["sparsity", "reached"]) -> float:
    return float(np.average([getattr(row, field) for row in rows], weights=[row.weights for row in rows]))


def _perplexity(rows: Sequence[PerplexityRow], title: str) -> Figure:
    """Draw each model's perplexity with its 95 % interval; between dense and pruned lie orders of magnitude."""
    drawing, (axis,) = figure(title, 1, epochs=False, size=(1.6 + 1.4 * len(rows), 4))
    for place, row in enumerate(rows):
        colour = "C0" if place == len(rows) - 1 else "gray"
        ends = [[row.perplexity - row.low], [row.high - row.perplexity]]
        axis.errorbar([place], [row.perplexity], ends, fmt="o", color=colour, capsize=5)
        axis.annotate(f"{row.perplexity:.4g}", (place, row.perplexity), (9, 0), textcoords="offset points", va="center")
    axis.set_yscale("log")
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    axis.set_ylim(low / 1.3, high * 1.3)
    names = [f"{row.allocation}\n{row.sparsity:.3g}" for row in rows]
    axis.set_xticks(range(len(rows)), [*names[:-1], f"{names[-1]}\n(this run)"])
    axis.set_xlim(-0.5, len(rows) - 0.3)
    axis.set(xlabel="allocation, and sparsity reached", ylabel="perplexity, 95 % interval")
    return drawing


def _alphas(rows: Sequence[LayerRow], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, epochs=False, size=(10, 4))
    lines = {"dense": [row.alpha for row in rows], "pruned": [row.alpha_after for row in rows]}
    # 0 and None: no tail.
    alphas = {label: np.array([value or np.nan for value in values], float) for label, values in lines.items()}
    both = np.concatenate(list(alphas.values()))
    top = _most_shown(both)
    step = (top - np.nanmin(both, initial=top)) / 20
    for number, (label, values) in enumerate(alphas.items()):
        beyond = values > top
        axis.plot(np.where(beyond, np.nan, values), ".-", lw=0.8, ms=4, color=f"C{number}", label=label)
        _mark_beyond(axis, values, beyond, top + step * (1 + number), f"C{number}")
    starts = [i for i, row in enumerate(rows) if i == 0 or row.block != rows[i - 1].block]
    every = max(1, len(starts) // 16)
    axis.set_xticks(starts[::every], [str(i) for i in range(0, len(starts), every)])
    axis.set(xlabel="layers, by block", ylabel="alpha")
    axis.legend(fontsize=8)
    return drawing


def _most_shown(values: np.ndarray) -> float:
    """Return the highest alpha on the axis: one of the few far beyond would press all others into a line."""
    values = values[np.isfinite(values)]
    if not values.size:
        return np.inf
    low, high = np.quantile(values, [0.25, 0.75])
    return float(values[values <= high + 3 * max(high - low, 0.1)].max())  # Tukey's outer fence


def _mark_beyond(axis: Any, values: np.ndarray, beyond: np.ndarray, height: float, colour: str) -> None:
    """Mark alphas above the axis by arrows at its upper end, with their values where these are few."""
    places = np.flatnonzero(beyond)
    axis.plot(places, np.full(len(places), height), "^", color=colour, ms=6)
    for place in places if len(places) <= _NAMED else ():
        name, at = f"{values[place]:.3g}", (place, height)
        axis.annotate(name, at, (5, 0), textcoords="offset points", fontsize=8, va="center", color=colour)
