"""A comparison of two models as one HTML file, of the same parts as that of a diagnosis."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl

from farms_jax.diagnosis import comparison_figures as figures
from farms_jax.diagnosis.columns import BY_NAME, MISSING, Column, Row, number, text
from farms_jax.diagnosis.page import PRINTED, chart, definitions, document, flat, layer_table, small_axes
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.svg import STYLE, inline_svg
from farms_jax.errors import listed

_NAMED = 200  # layers of one model alone that are named
_HINT = """A layer's name opens the spectra of its windows, on logarithmic axes: before as an outline,
<span class="fill">after filled</span>."""


def page(
    rows: Sequence[Row],
    columns: Sequence[Column],
    histograms: Mapping[str, tuple[Histogram, Histogram]],
    *,
    models: tuple[str, str],
    headline: str,
    settings: Mapping[str, Any],
    alone: Mapping[str, Sequence[str]],
    damaged: Mapping[str, Mapping[str, str]],
) -> str:
    """Return the page as HTML; whatever names contain is text, never markup.

    `rows` are in network order, `histograms` have the spectra before and after by layer, `alone` the layers that only
    one of the models has, `damaged` those that could not be measured, with the reason.
    """
    tooltips = {f"#l{i}": _sentence(row) for i, row in enumerate(rows)}
    with mpl.rc_context(STYLE):
        charts = "".join(
            chart(name, note, draw, rows, tooltips)
            for name, note, draw, column in (
                (
                    "alpha",
                    "before and after; strong where the change is beyond its error",
                    figures.changes_by_depth,
                    "alpha_change",
                ),
                ("moved", "difference of the weights over their size", figures.moves_by_depth, "moved"),
            )
            if any(number(row, column) is not None for row in rows)
        )
        details = [_details(row, drawing) for row, drawing in zip(rows, _spectra(rows, histograms), strict=True)]
    changed = (row for row in rows if number(row, "alpha_change"))
    largest = sorted(changed, key=lambda row: -abs(row["alpha_change"]))[:PRINTED]
    table = layer_table(rows, columns, details, _HINT, {row["layer"] for row in largest})
    only = [(f"only in {side} ({len(names)})", listed(names, _NAMED, ", ")) for side, names in alone.items() if names]
    faults = [(f"{name} in {side}", reason) for side, layers in damaged.items() for name, reason in layers.items()]
    measured = [(name.replace("_", " "), flat(value)) for name, value in settings.items() if value is not None]
    glossary = definitions((column.name, column.meaning) for column in columns)
    body = f"""{_cards(rows, alone)}
{f'<section class="out"><h2>Not measured</h2>{definitions(faults)}</section>' if faults else ""}
<section class="charts" aria-label="Charts">{charts}</section>
{table}
{f'<section class="out"><h2>In one model alone</h2>{definitions(only)}</section>' if only else ""}
<section class="out"><h2>How both were measured</h2>{definitions(measured)}</section>
<section class="out"><details><summary>What the columns mean</summary>{glossary}</details></section>"""
    return document("Comparison", f"{models[0]} → {models[1]}", headline, body)


def _cards(rows: Sequence[Row], alone: Mapping[str, Sequence[str]]) -> str:
    cards = [(len(rows), "layers", "of one name in both models")]
    if any("beyond_error" in row for row in rows):
        cards += [(sum(bool(row.get("beyond_error")) for row in rows), "changed", "alpha moved beyond its error")]
    if any("moved" in row for row in rows):
        cards += [(sum(row.get("moved") == 0 for row in rows), "the same", "every weight is as before")]
    cards += [(sum("->" in str(row.get("status")) for row in rows), "another status", "the verdict changed")]
    cards += [(len(names), f"only in {side}", "layers of one model alone") for side, names in alone.items() if names]
    inside = "".join(
        f'<div class="card"><b>{count}</b><span>{escape(name)}</span><p>{note}</p></div>' for count, name, note in cards
    )
    return f'<section class="cards" aria-label="Summary">{inside}</section>'


def _spectra(rows: Sequence[Row], histograms: Mapping[str, tuple[Histogram, Histogram]]) -> Iterator[str]:
    """Yield a drawing per row, empty for a layer without spectra."""
    figure, axis = small_axes()
    for row in rows:
        both = histograms.get(row["layer"])
        if both and all(any(histogram.windows) for histogram in both):
            figures.two_spectra(axis, *both)
            yield inline_svg(figure, f"spectra of {row['layer']} before and after", {})
        else:
            yield ""


def _sentence(row: Row) -> str:
    before, after = (text({"alpha": row.get(f"alpha_{side}")}, BY_NAME["alpha"]) for side in "ab")
    return f"{row['layer']}: alpha {before} before, {after} after; {row.get('status') or 'not judged'}"


def _details(row: Row, drawing: str) -> str:
    facts = [("status", str(row.get("status") or MISSING))]
    for name in ("alpha", "whole_alpha", "ww_alpha", "whole_stable_rank", "mp_spikes", "rank"):
        before, after = (text({name: row.get(f"{name}_{side}")}, BY_NAME[name]) for side in "ab")
        if {before, after} != {MISSING}:
            facts.append((name.replace("_", " "), f"{before} before, {after} after"))
    return f'<div class="w">{drawing}<div>{definitions(facts)}</div></div>'
