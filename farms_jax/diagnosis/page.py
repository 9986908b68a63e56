"""A diagnosis as one HTML file: styles, script and drawings inside, nothing to fetch, complete without the script."""

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl

from farms_jax._figures import NAMED_TICKS
from farms_jax._present import by_reason
from farms_jax.diagnosis import figures
from farms_jax.diagnosis.columns import BY_NAME, MISSING, Column, Row, number, text, with_interval
from farms_jax.diagnosis.page_findings import breakable, findings
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.status import MEANINGS, SEVERITY, attention, counts, severity
from farms_jax.diagnosis.steps import Step
from farms_jax.diagnosis.svg import STYLE, inline_svg
from farms_jax.errors import listed

PRINTED = 24  # layers that need attention most, whose spectra are printed on paper
_NAMED = 200  # left-out arrays that are named for one reason
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_WITHOUT_SCRIPT = ".d{display:table-row}table:not(.all) tr>*{display:table-cell!important}.tools{display:none}"
_SYMBOLS = dict(zip(SEVERITY, "✕■▲◆▼●·", strict=True))  # the marks of the figures
_WIDE, _NARROW, _SMALL = (14.4, 4.4), (7.6, 4.0), (5.8, 2.8)  # inches of 72 pixels
_NAMES = 1.6  # inches for the names of layers
_HINT = """A layer's name opens its spectrum, on logarithmic axes: <span class="fill">windows filled</span>, whole
matrix as an outline, dotted where the tail starts, and <span class="s0">the fitted power law</span>."""


def page(
    rows: Sequence[Row],
    columns: Sequence[Column],
    histograms: Mapping[str, Histogram],
    *,
    model: str,
    headline: str,
    steps: Sequence[Step],
    facts: Mapping[str, Any],
    left_out: Sequence[tuple[str, str]],
) -> str:
    """Return the page as HTML; whatever names and reasons contain is text, never markup.

    `rows` are in network order, and `histograms` are by layer: one without a spectrum is shown without. The headline
    says what needs attention and begins with the model's name, `steps` what to do about it; `facts`, in types of JSON,
    are where the weights come from and how they were measured; `left_out` has the (name, reason) of the arrays that are
    not layers.
    """
    with mpl.rc_context(STYLE):
        charts = _charts(rows)
        details = [_details(row, drawing) for row, drawing in zip(rows, _spectra(rows, histograms), strict=True)]
    table = layer_table(rows, columns, details, _HINT, {row["layer"] for row in attention(rows)[:PRINTED]})
    reasons = by_reason(left_out).items()
    unused = [(f"{reason} ({len(names)})", listed(names, _NAMED, ", ")) for reason, names in reasons]
    provenance = [(name.replace("_", " "), flat(value)) for name, value in facts.items() if value is not None]
    glossary = definitions([*MEANINGS.items(), *((column.name, column.meaning) for column in columns)])
    body = f"""{_cards(rows)}
{findings(rows, steps)}
{charts}
{table}
{f'<section class="out"><h2>Left out</h2>{definitions(unused)}</section>' if unused else ""}
<section class="out"><h2>How it was measured</h2>{definitions(provenance)}</section>
<section class="out"><details><summary>What the statuses and the columns mean</summary>{glossary}</details></section>"""
    return document("Layer diagnosis", model, headline.removeprefix(model).lstrip(":, "), body)


def document(kind: str, title: str, lead: str, body: str) -> str:
    """Return a whole page: what it is and of which model, as texts; one sentence that says most; and what follows."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}: {escape(kind.lower())}</title>
<style>{style}</style>
<noscript><style>{_WITHOUT_SCRIPT}</style></noscript>
</head><body>
<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}.</p></header>
<main>
{body}
</main>
<script>{script}</script>
</body></html>
"""


def flat(value: Any) -> str:
    """Return a nested value of JSON's types in one line, without entries that are `None`.

    >>> flat({"window": {"rows": None, "per_axis": 10}, "whole": True, "seconds": 1.234567})
    'window (per axis 10), whole yes, seconds 1.235'
    >>> flat({"axes": {".*/kv_einsum/w": "OIO"}})  # a pattern stays as it is
    'axes (.*/kv_einsum/w OIO)'
    """
    if isinstance(value, Mapping):
        parts = []
        for name, entry in value.items():
            inner = flat(entry)
            if entry is not None:
                said = name.replace("_", " ") if name.isidentifier() else name
                parts.append(f"{said} {f'({inner})' if isinstance(entry, Mapping) else inner}")
        return ", ".join(parts)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(flat, value)) if isinstance(value, (list, tuple)) else str(value)


def _cards(rows: Sequence[Row]) -> str:
    alphas = [alpha for row in rows if (alpha := number(row, "alpha")) is not None]
    params = sum(int(number(row, "num_params") or 0) for row in rows)
    cards = f'<div class="card"><b>{len(rows)}</b><span>layers</span><p>{params:,} parameters</p></div>'
    if alphas:
        ends = f"median of the layers; {min(alphas):.2f} to {max(alphas):.2f}"
        cards += f'<div class="card"><b>{statistics.median(alphas):.2f}</b><span>alpha</span><p>{ends}</p></div>'
    for status, count in counts(rows).items():
        symbol, meaning = _SYMBOLS.get(status, ""), escape(MEANINGS.get(status, ""))
        cards += (
            f'<button type="button" class="card" data-status="{escape(status)}">'
            f'<span class="k s{severity(status)}" aria-hidden="true">{symbol}</span>'
            f"<b>{count}</b><span>{escape(status)}</span><p>{meaning}</p></button>"
        )
    return f'<section class="cards" aria-label="Summary">{cards}</section>'


def _charts(rows: Sequence[Row]) -> str:
    if not any(number(row, "alpha") for row in rows):
        return ""
    charts = [
        ("alpha by depth", "the smaller, the heavier the tail", figures.alphas_by_depth, None),
        ("alphas", "how many layers have which", figures.alpha_histogram, _NARROW),
    ]
    if any(number(row, "aspect_ratio_bias") is not None for row in rows):
        charts += [("aspect-ratio bias", "what the whole matrix adds to alpha", figures.bias_by_aspect_ratio, _NARROW)]
    tooltips, drawn = {}, ""
    for i, row in enumerate(rows):
        whole = number(row, "whole_alpha")
        more = "" if whole is None else f", whole matrix {whole:.2f}"
        alpha = with_interval(row, BY_NAME["alpha"])
        tooltips[f"#l{i}"] = f"{row['layer']}: alpha {alpha}{more}; {row.get('status') or 'not judged'}"
    for name, note, draw, size in charts:
        drawn += chart(name, note, draw, rows, tooltips, size)
    return f'<section class="charts" aria-label="Charts">{drawn}</section>'


def chart(
    name: str,
    note: str,
    draw: Callable[[Any, Sequence[Row]], None],
    rows: Sequence[Row],
    tooltips: Mapping[str, str],
    size: tuple[float, float] | None = None,
) -> str:
    """Return a drawing of the layers with its caption; without a size it is wide, with room for few layers' names."""
    wide = _WIDE if len(rows) > NAMED_TICKS else (_WIDE[0], _WIDE[1] + _NAMES)
    figure, axis = figures.axes(size=size or wide)
    draw(axis, rows)
    return (
        f"<figure{'' if size else ' class=wide'}><figcaption><b>{name}</b> <span>{note}</span></figcaption>"
        f"{inline_svg(figure, f'{name}: {note}', tooltips)}</figure>"
    )


def small_axes() -> tuple[Any, Any]:
    """Return a figure with axes for one layer's spectrum after the other: axes are slow to make."""
    figure, axis = figures.axes(size=_SMALL)
    figure.set_layout_engine("none")
    axis.set_position((0.12, 0.19, 0.86, 0.78))
    return figure, axis


def _spectra(rows: Sequence[Row], histograms: Mapping[str, Histogram]) -> Iterator[str]:
    """Yield a drawing per row, empty for a layer without a spectrum."""
    figure, axis = small_axes()
    for row in rows:
        histogram = histograms.get(row["layer"])
        if histogram and any((*histogram.windows, *histogram.whole)):
            figures.spectrum(axis, row, histogram)
            yield inline_svg(figure, f"spectrum of {row['layer']}", {})
        else:
            yield ""


def layer_table(
    rows: Sequence[Row], columns: Sequence[Column], details: Sequence[str], hint: str, printed: Iterable[str]
) -> str:
    """Return a table to search and sort, whose layers open to their `details`; `printed` names those open on paper.

    `details` and `hint` are HTML.
    """
    # Those of the terminal first: the others are shown on demand.
    ordered = sorted((column for column in columns if column.name != "reason"), key=lambda column: not column.head)
    chosen = sum(bool(column.head) for column in ordered)
    printed = set(printed)
    bodies = "".join(
        _layer(i, row, ordered, inside, printed=row["layer"] in printed)
        for i, (row, inside) in enumerate(zip(rows, details, strict=True))
    )
    options = "".join(f'<option value="{severity(s)}">{s}</option>' for s in counts(rows) if s in SEVERITY)
    return f"""<section class="layers"><h2>Layers</h2>
<div class="tools"><label>Find <input type="search" id="find" placeholder="part of a name"></label>
<label>Status <select id="status"><option value="">all</option>{options}</select></label>
<label><input type="checkbox" id="all"> all {len(ordered)} columns</label>
<button type="button" id="open">Open those shown</button><output id="count" aria-live="polite"></output></div>
<p class="hint">{hint}</p>
<div class="scroll" tabindex="0" role="region" aria-label="Table of layers">
<style>table:not(.all) tr>:nth-child(n+{chosen + 1}){{display:none}}</style>
<table><thead>{_heads(ordered)}</thead>{bodies}</table></div></section>"""


def _heads(columns: Sequence[Column]) -> str:
    groups = "".join(
        f'<th colspan="{len(list(members))}" scope="colgroup"{" class=x" if hidden else ""}>{escape(name)}</th>'
        for (hidden, name), members in groupby(columns, key=lambda column: (not column.head, column.group))
    )
    heads = "".join(
        f'<th scope="col" title="{escape(column.meaning)}" aria-sort="none">'
        f'<button type="button">{_in_two(column.name)}</button></th>'
        for column in columns
    )
    above = f'<tr class="g">{groups}</tr>' if any(column.group for column in columns) else ""
    return f'{above}<tr class="h">{heads}</tr>'


def _in_two(name: str) -> str:
    """Allow a column's name to break after the underscore nearest to its middle."""
    places = [match.end() for match in re.finditer("_", name)]
    middle = min(places, key=lambda place: abs(place - len(name) / 2), default=0)
    return f"{name[:middle]}<wbr>{name[middle:]}"


def _layer(i: int, row: Row, columns: Sequence[Column], details: str, *, printed: bool) -> str:
    status = row.get("status")
    place = SEVERITY.index(status) if status in SEVERITY else ""
    cells = []
    for column in columns:
        if column.name == "layer":
            name = breakable(row["layer"])
            cells.append(f'<th scope="row"><button type="button" aria-expanded="false">{name}</button></th>')
        elif column.name == "status":
            cells.append(f'<td class="st s{place}">{escape(text(row, column))}</td>')
        else:
            cells.append(f"<td>{escape(with_interval(row, column))}</td>")
    return (
        f'<tbody id="l{i}" data-s="{place}"><tr>{"".join(cells)}</tr>'
        f'<tr class="d{" p" if printed else ""}"><td colspan="{len(columns)}">{details}</td></tr></tbody>\n'
    )


def _details(row: Row, drawing: str) -> str:
    reason = f"<p>{escape(str(row['reason']))}</p>" if row.get("reason") else ""
    sentences = (
        ("alpha", "{alpha}, between {alpha_low} and {alpha_high}"),
        ("tail", "{num_tail} eigenvalues from {xmin} on; KS {ks_distance}; windows: {num_windows}"),
        ("place", "{rank}, between {rank_low} and {rank_high}"),
        ("whole matrix", "{whole_alpha}; WeightWatcher's rule {ww_alpha} with {ww_num_tail} eigenvalues"),
        ("noise", "alpha {noise_alpha}; {mp_spikes} eigenvalues beyond the bulk, which ends at {mp_max}"),
    )
    values = {name: text(row, column) for name, column in BY_NAME.items()}
    facts = [
        (name, sentence.format_map(values))
        for name, sentence in sentences
        if MISSING not in {values[field] for field in re.findall(r"{(\w+)}", sentence)}
    ]
    return f'<div class="w">{drawing}<div>{reason}{definitions(facts)}</div></div>'


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Return (term, text) pairs as a list of definitions."""
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(said)}</dd>' for term, said in entries)}</dl>"
