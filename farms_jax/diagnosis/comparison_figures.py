"""Figures of a comparison, in Matplotlib; a mark of a layer is a link to its row of the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from farms_jax._figures import name_layers
from farms_jax.diagnosis.columns import Row
from farms_jax.diagnosis.figures import COLOURS, legend, limits, log_axes, numbers
from farms_jax.diagnosis.spectrum import Histogram


def changes_by_depth(axis: Any, rows: Sequence[Row]) -> None:
    """Draw the alpha of every layer before and after, joined by a line that is strong where it is beyond its error.

    An alpha that the axis does not reach stands on its edge.
    """
    before, after = numbers(rows, "alpha_a"), numbers(rows, "alpha_b")
    in_both, beyond = np.isfinite(before + after), np.array([bool(row.get("beyond_error")) for row in rows])
    # What changed is far from the others, and no reason to leave it out.
    groups = [
        *(side[np.isfinite(side)] for side in (before, after)),
        *(side[in_both & beyond] for side in (before, after)),
    ]
    ends = [limits(group) for group in groups if group.size]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    before, after = np.clip(before, low, high), np.clip(after, low, high)
    for places, weight in ((np.flatnonzero(in_both & beyond), 3.0), (np.flatnonzero(in_both & ~beyond), 1.0)):
        axis.vlines(places, before[places], after[places], colors=COLOURS["whole"], lw=weight, alpha=0.7, zorder=2)
    axis.plot(before, "o", mfc="none", color=COLOURS["whole"], ms=5.5, mew=1, label="before", zorder=2.5)
    places = np.flatnonzero(np.isfinite(after))
    marks = axis.scatter(places, after[places], s=40, color=COLOURS["fill"], label="after", clip_on=False, zorder=3)
    marks.set_urls([f"#l{i}" for i in places.tolist()])
    axis.set(ylim=(low, high), ylabel="alpha")
    legend(axis)
    name_layers(axis, [row["layer"] for row in rows])


def moves_by_depth(axis: Any, rows: Sequence[Row]) -> None:
    """Draw how far the weights of every layer moved, relative to their size; at least one must be known."""
    moved = numbers(rows, "moved")
    places = np.flatnonzero(np.isfinite(moved))
    high = limits(moved[moved > 0])[1] if (moved > 0).any() else 1.0
    marks = axis.scatter(places, np.minimum(moved[places], high), s=40, color=COLOURS["fill"], clip_on=False, zorder=3)
    marks.set_urls([f"#l{i}" for i in places.tolist()])
    axis.set(ylim=(0, high), ylabel="|B - A| / |A|")
    name_layers(axis, [row["layer"] for row in rows])


def two_spectra(axis: Any, before: Histogram, after: Histogram) -> None:
    """Draw the windows' spectra of a layer before and after, on logarithmic axes; what was drawn there is cleared."""
    log_axes(axis)
    edges = [10.0 ** np.array(histogram.edges) for histogram in (before, after)]
    densities = np.array([*before.windows, *after.windows])
    filled = densities[densities > 0]
    low, high = (filled.min() / 1.4, filled.max() * 1.4) if filled.size else (0.1, 1.0)
    axis.set(xlim=(min(edge[0] for edge in edges), max(edge[-1] for edge in edges)), ylim=(low, high))
    styles = ({"color": COLOURS["whole"], "label": "before"}, {"color": COLOURS["fill"], "label": "after"})
    for histogram, ends, style in zip((before, after), edges, styles, strict=True):
        more = {"fill": True, "alpha": 0.55} if style["label"] == "after" else {}
        axis.stairs(np.maximum(histogram.windows, low), ends, baseline=low, **style, **more)
