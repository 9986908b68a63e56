"""Figures of a diagnosis, in Matplotlib: for notebooks and papers, and, through `svg`, for the HTML page.

A mark of a layer is a link to its row of the page (`#l5` for the sixth): nothing follows it elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from farms_jax._figures import SIZE, figure, name_layers
from farms_jax.diagnosis.columns import Row, number
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.status import GOOD, SEVERITY

# The page has each of them once more for dark screens, under these names.
COLOURS = {
    "s0": "#be123c",
    "s1": "#7c3aed",
    "s2": "#b45309",
    "s3": "#0369a1",
    "s4": "#4d7c0f",
    "s5": "#0f766e",
    "s6": "#6b7280",
    "fill": "#5b8fb9",
    "whole": "#4b5563",
    "noise": "#c2410c",
}
MARKS = dict(zip(SEVERITY, "xs^Dvo.", strict=True))  # told apart by shape as well as by colour
_FENCE = 3.0  # quartile distances beyond the quartiles: points farther out do not stretch the axis (Tukey's "far out")
_MARGIN = 0.06  # of the range, free at both ends of an axis
_MANY = 300  # layers, beyond which marks are smaller
NARROW = (6.0, SIZE[1])
_WINDOWS = {"fill": True, "color": COLOURS["fill"], "alpha": 0.55, "label": "windows"}
_WHOLE = {"color": COLOURS["whole"], "label": "whole matrix"}


def limits(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis for values (N,), N >= 1, so that single far points do not flatten all others.

    >>> limits(np.array([2.0, 2.0])), limits(np.array([1.0, 2.0, 3.0, 4.0, 1000.0]))[1] < 11
    ((1.5, 2.5), True)
    """
    low, high = float(values.min()), float(values.max())
    first, third = np.quantile(values, [0.25, 0.75])
    if reach := _FENCE * float(third - first):
        low, high = max(low, float(first) - reach), min(high, float(third) + reach)
    room = _MARGIN * (high - low) or 0.5
    return low - room, high + room


def alpha_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of an axis for alphas of windows, whole matrices and noise, without the far points of each."""
    kinds = (("alpha", "alpha_low", "alpha_high"), ("whole_alpha",))
    found = [np.concatenate([numbers(rows, name) for name in names]) for names in kinds] + [_noise(rows)]
    ends = [limits(values[np.isfinite(values)]) for values in found if np.isfinite(values).any()]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (1.0, 3.0)


def _noise(rows: Sequence[Row]) -> np.ndarray:
    """Return the alphas of noise to draw beside those of the layers, (L,): NaN where these are of another rule."""
    return np.where(np.isfinite(numbers(rows, "median_alpha")), np.nan, numbers(rows, "noise_alpha"))


def axes(title: str = "", size: tuple[float, float] = SIZE) -> tuple[Figure, Any]:
    """Make a figure with empty axes for one of the functions below; `size` is width and height in inches."""
    drawing, (axis,) = figure(title, 1, epochs=False, size=size)
    axis.grid(visible=False, axis="x")
    return drawing, axis


def alphas_by_depth(axis: Any, rows: Sequence[Row]) -> None:
    """Draw the alphas of windows with their intervals, of whole matrices and of noise, layer by layer.

    An alpha that the axis does not reach stands on its edge.
    """
    low, high = alpha_limits(rows)
    levels, wholes, alphas = _noise(rows), numbers(rows, "whole_alpha"), numbers(rows, "alpha")
    if np.isfinite(levels).any():
        axis.plot(levels, "--", color=COLOURS["noise"], lw=1.4, label="noise", zorder=1)
    if np.isfinite(wholes).any():
        style = {"mfc": "none", "color": COLOURS["whole"], "ms": 5.5, "mew": 1}
        axis.plot(np.clip(wholes, low, high), "o", label="whole matrix", zorder=2, **style)
    ends = np.clip([numbers(rows, "alpha_low"), numbers(rows, "alpha_high")], low, high)
    known = np.flatnonzero(np.isfinite(ends).all(axis=0)).tolist()
    axis.vlines(known, *ends[:, known], colors=[_colour(rows[i]) for i in known], lw=1.5, alpha=0.6, zorder=2.5)
    _mark_layers(axis, rows, np.arange(len(rows)), np.clip(alphas, low, high))
    beyond = int(sum(((values < low) | (values > high)).sum() for values in (alphas, wholes)))
    axis.set(ylim=(low, high), ylabel=f"alpha ({beyond} far away, on the edge)" if beyond else "alpha")
    name_layers(axis, [row["layer"] for row in rows])


def alpha_histogram(axis: Any, rows: Sequence[Row]) -> None:
    """Draw how many layers have which alpha, by windows and by whole matrices."""
    low, high = alpha_limits(rows)
    bins = min(40, max(12, round(2 * len(rows) ** 0.5)))  # few layers in many bins are no histogram
    for name, style in (("alpha", _WINDOWS), ("whole_alpha", _WHOLE)):
        values = numbers(rows, name)
        if np.isfinite(values).any():
            counts, edges = np.histogram(np.clip(values[np.isfinite(values)], low, high), bins, (low, high))
            axis.stairs(counts, edges, **style)
    levels = _noise(rows)
    if np.isfinite(levels).any():
        axis.axvline(float(np.nanmedian(levels)), color=COLOURS["noise"], ls="--", lw=1.4, label="noise")
    axis.set(xlim=(low, high), xlabel="alpha", ylabel="layers")
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    legend(axis)


def bias_by_aspect_ratio(axis: Any, rows: Sequence[Row]) -> None:
    """Draw what the whole matrix adds to alpha, against the aspect ratio; at least one row needs a bias.

    A bias that the axis does not reach stands on its edge.
    """
    ratios, biases = numbers(rows, "Q"), numbers(rows, "aspect_ratio_bias")
    low, high = limits(np.append(biases[np.isfinite(biases)], 0.0))
    axis.axhline(0, color=COLOURS["whole"], lw=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlim=(0.9, 1.1 * max(2.0, np.nanmax(ratios))), ylim=(low, high))
    axis.set(xlabel="aspect ratio Q", ylabel="alpha of whole - of windows")
    _mark_layers(axis, rows, ratios, np.clip(biases, low, high))


def spectrum(axis: Any, row: Row, histogram: Histogram) -> None:
    """Draw one layer's spectrum on logarithmic axes: windows, whole matrix, the tail's start and its fitted slope.

    Axes with the spectrum of another layer are cleared first.
    """
    log_axes(axis)
    edges, densities = 10.0 ** np.array(histogram.edges), np.array([*histogram.windows, *histogram.whole])
    filled = densities[densities > 0]
    low, high = (filled.min() / 1.4, filled.max() * 1.4) if filled.size else (0.1, 1.0)
    axis.set(xlim=edges[[0, -1]], ylim=(low, high))
    for values, style in ((histogram.windows, _WINDOWS), (histogram.whole, _WHOLE)):
        if values:
            axis.stairs(np.maximum(values, low), edges, baseline=low, **style)
    if (line := tail_line(row, histogram)) is not None:
        start, top, end, bottom = line
        axis.axvline(10**start, color=COLOURS["whole"], ls=":", lw=1.2, label="start of the tail")
        cut = min(top, max(bottom, np.log10(low)))  # where the line meets the axis
        end = start + (end - start) * (top - cut) / (top - bottom)
        label = f"power law, alpha {row['alpha']:.2f}"
        axis.plot([10**start, 10**end], [10**top, 10**cut], color=COLOURS["s0"], lw=2, label=label)


def log_axes(axis: Any) -> None:
    """Make axes those of a spectrum, and clear what was drawn in them."""
    if axis.get_xscale() != "log":  # setting it is half the time of a drawing
        axis.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="density")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(numticks=6))
            side.set_major_formatter("{x:g}")
            side.set_minor_locator(NullLocator())
    for artist in [*axis.lines, *axis.patches]:
        artist.remove()


def tail_line(row: Row, histogram: Histogram) -> tuple[float, float, float, float] | None:
    """Return log10 of (eigenvalue, density) where the fitted power law starts and, flattened after it, where it ends.

    A density x^-alpha is x^(1 - alpha) over log10(x); it is scaled to the share of the windows' eigenvalues beyond
    `xmin`. `None` for a layer without a tail, or whose tail starts below the spectrum.
    """
    alpha, xmin = number(row, "alpha"), number(row, "xmin")
    if alpha is None or not xmin or alpha <= 1:
        return None
    edges, values, start = np.array(histogram.edges), np.array(histogram.windows), np.log10(xmin)
    inside = np.clip(edges[1:] - start, 0, edges[1] - edges[0])  # of each bin
    share = float(values @ inside)
    if share <= 0 or start < edges[0]:
        return None
    end = edges[1:][(values > 0) & (inside > 0)].max()
    top = np.log10(np.log(10) * share * (alpha - 1))
    return float(start), float(top), float(end), float(top - (alpha - 1) * (end - start))


def numbers(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a column as numbers to draw, shape (L,); NaN for a missing value."""
    return np.array([number(row, name) for row in rows], float)


def _mark_layers(axis: Any, rows: Sequence[Row], x: np.ndarray, y: np.ndarray) -> None:
    """Mark every layer by its status, those that need attention in front."""
    for status in (*reversed(SEVERITY), None):
        places = [i for i, row in enumerate(rows) if (row.get("status") or None) == status and np.isfinite(y[i])]
        if places:
            marks = axis.scatter(
                x[places],
                y[places],
                s=45 if len(rows) <= _MANY else 20,
                marker=MARKS[status or GOOD],
                color=_colour(rows[places[0]]),
                linewidths=2 if status == "degenerate" else 0,
                label=status or "layers",
                clip_on=False,
                zorder=3,
            )
            marks.set_urls([f"#l{i}" for i in places])
    legend(axis)


def _colour(row: Row) -> str:
    status = row.get("status")
    return COLOURS[f"s{SEVERITY.index(status if status in SEVERITY else GOOD)}"]


def legend(axis: Any) -> None:
    """Name what is drawn in one line above the axes."""
    tight = {"columnspacing": 1.2, "handletextpad": 0.4}
    axis.legend(ncols=6, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, **tight)
