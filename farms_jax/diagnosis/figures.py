"""Figures of a diagnosis for notebooks and papers, in Matplotlib: the same three as on the HTML page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from farms_jax._present import name_layers, optional
from farms_jax.diagnosis.charts import alpha_limits, tail_line
from farms_jax.diagnosis.summary import GOOD, SEVERITY, attention
from farms_jax.diagnosis.table import Row, number
from farms_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from farms_jax.diagnosis.diagnosis import Diagnosis

_LOOKS = {"degenerate": ("#be123c", "x"), "over-correlated": ("#7c3aed", "s"), "undertrained": ("#b45309", "^")}
_LOOKS |= {GOOD: ("#0f766e", "o")}
_NOISE, _WHOLE, _WINDOWS = "#c2410c", "#4b5563", "#5b8fb9"


def draw(diagnosis: "Diagnosis", kind: str, layer: str | None) -> "Figure":
    """Draw one figure; see `Diagnosis.plot`.

    Args:
        diagnosis: what it shows.
        kind: `alpha`, `spectrum` or `bias`.
        layer: whose spectrum.

    Returns:
        The figure.

    Raises:
        InputError: there is nothing to draw; the message says what is missing.
    """
    if kind not in {"alpha", "spectrum", "bias"}:
        raise InputError(f"plot: there is no kind {kind!r}; there are 'alpha', 'spectrum' and 'bias'")
    if layer is not None and kind != "spectrum":
        raise InputError(f"plot: kind {kind!r} shows all layers; leave out `layer`, or take kind 'spectrum'")
    optional("matplotlib")
    if kind == "spectrum":
        return _spectrum(diagnosis, layer)
    return _alphas(diagnosis) if kind == "alpha" else _bias(diagnosis)


def _alphas(diagnosis: "Diagnosis") -> "Figure":
    rows = diagnosis.layers
    figure, axis = _figure(f"{diagnosis.model}: alpha of the layers")
    levels = _numbers(rows, "noise_alpha")
    if np.isfinite(levels).any():
        axis.plot(levels, "--", color=_NOISE, lw=1.2, label="noise", zorder=1)
    wholes = _numbers(rows, "whole_alpha")
    if np.isfinite(wholes).any():
        axis.plot(wholes, "o", mfc="none", color=_WHOLE, ms=4, mew=0.9, label="whole matrix", zorder=2)
    alphas = _numbers(rows, "alpha")
    below, above = alphas - _numbers(rows, "alpha_low"), _numbers(rows, "alpha_high") - alphas
    errors = np.maximum(0, [below, above])
    for places, (colour, mark), label in _by_status(rows):
        bars = None if np.isnan(errors[:, places]).all() else errors[:, places]
        style = {"fmt": mark, "color": colour, "ms": 4.5, "elinewidth": 1, "label": label, "zorder": 3}
        axis.errorbar(places, alphas[places], yerr=bars, **style)
    if np.isfinite(alphas).any():
        axis.set_ylim(*alpha_limits(rows))
    axis.set_ylabel("alpha")
    name_layers(axis, diagnosis.names)
    axis.legend(fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _bias(diagnosis: "Diagnosis") -> "Figure":
    rows = diagnosis.layers
    tails = _numbers(rows, "alpha") + _numbers(rows, "whole_alpha")  # NaN where one of them has none
    ratios, biases = _numbers(rows, "Q"), _numbers(rows, "aspect_ratio_bias") + 0 * tails
    if not np.isfinite(biases).any():
        raise InputError("plot: the bias needs whole matrices; measure with whole=True")
    figure, axis = _figure(f"{diagnosis.model}: what the whole matrix adds to alpha", width=6.0)
    axis.axhline(0, color=_WHOLE, lw=0.8)
    for places, (colour, mark), label in _by_status(rows):
        axis.plot(ratios[places], biases[places], mark, color=colour, alpha=0.8, ms=5, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="aspect ratio Q", ylabel="alpha of the whole matrix - alpha of the windows")
    axis.legend(fontsize=8)
    return figure


def _spectrum(diagnosis: "Diagnosis", layer: str | None) -> "Figure":
    rows = {row["layer"]: row for row in [*attention(diagnosis.layers), *diagnosis.layers]}
    name = next(iter(rows), "") if layer is None else layer
    if name not in rows:
        raise InputError(f"plot: there is no layer {name!r}; `names` has those that there are")
    if name not in diagnosis.histograms:
        raise InputError(f"plot: {name} has no spectrum in this diagnosis")
    histogram, row = diagnosis.histograms[name], rows[name]
    figure, axis = _figure(f"{name}: {row.get('status') or 'spectrum'}", width=6.0)
    edges = 10.0 ** np.array(histogram.edges)
    axis.stairs(histogram.windows, edges, fill=True, color=_WINDOWS, alpha=0.55, label="windows")
    if histogram.whole:
        axis.stairs(histogram.whole, edges, color=_WHOLE, label="whole matrix")
    if (line := tail_line(row, histogram)) is not None:
        start, top, end, bottom = line
        axis.axvline(10**start, color="black", ls=":", lw=1, label="start of the tail")
        label = f"power law, alpha {row['alpha']:.2f}"
        axis.plot([10**start, 10**end], [10**top, 10**bottom], color=_LOOKS["degenerate"][0], label=label)
    densities = np.array([*histogram.windows, *histogram.whole])
    if (densities > 0).any():
        axis.set_ylim(densities[densities > 0].min() / 1.5, densities.max() * 1.5)
    axis.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="density over log10(eigenvalue)")
    axis.legend(fontsize=8)
    return figure


def _figure(title: str, width: float | None = None) -> tuple["Figure", Any]:
    # Only here: a table is read without Matplotlib.
    from farms_jax._figures import SIZE, figure

    drawing, (axis,) = figure(title, 1, epochs=False, size=(width or SIZE[0], SIZE[1]))
    return drawing, axis


def _numbers(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([np.nan if (value := number(row, name)) is None else value for row in rows])


def _by_status(rows: Sequence[Row]) -> list[tuple[list[int], tuple[str, str], str]]:
    """Places of the layers of each status, how they look, and the status; layers without one are `layers`."""
    found = []
    for status in (*reversed(SEVERITY), None):
        places = [i for i, row in enumerate(rows) if (row.get("status") or None) == status]
        if places:
            found.append((places, _LOOKS[status or GOOD], status or "layers"))
    return found
