"""The findings of the page, above its charts: what to do now, layers by type, and where WeightWatcher disagrees."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape

from farms_jax.diagnosis.columns import BY_NAME, Row, text
from farms_jax.diagnosis.status import disagreement_summary, disagreements
from farms_jax.diagnosis.steps import Step
from farms_jax.diagnosis.summary import HEADS, LEFT, telling_types

_SHOWN = 8  # layers on which both disagree, shown at once
_HEADS = {
    "layer": BY_NAME["layer"].meaning,
    "WeightWatcher": BY_NAME["ww_status"].meaning,
    "ww_alpha": BY_NAME["ww_alpha"].meaning,
    "FARMS": BY_NAME["status"].meaning,
    "alpha": BY_NAME["alpha"].meaning,
    "why": "what each of both looks at",
}
_LEFT = {0, 1, 3, 5}  # columns of text


def findings(rows: Sequence[Row], steps: Sequence[Step]) -> str:
    """Return the sections as HTML; empty ones are left out."""
    groups = telling_types(rows)
    types = _table(HEADS, LEFT, (group.cells() for group in groups), "types") if groups else ""
    sections = [
        _section("What to do now", f'<ol class="steps">{"".join(map(_step, steps))}</ol>' if steps else ""),
        _section("By type", types),
        _section("Where FARMS and WeightWatcher disagree", _disagreements(rows)),
    ]
    return f'<div class="findings">{"".join(sections)}</div>'


def breakable(name: str) -> str:
    """Return a layer's name as HTML that may break after its separators."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(name))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _step(step: Step) -> str:
    code = f"<pre>{escape(chr(10).join(step.code))}</pre>" if step.code else ""
    return (
        f"<li><b>{escape(step.found)}</b><p><i>usually</i> {escape(step.means)}</p>"
        f"<p><i>try</i> {escape(step.attempt)}</p>{code}</li>"
    )


def _disagreements(rows: Sequence[Row]) -> str:
    """Return in sentences how many layers WeightWatcher judges otherwise, and a table of those that differ most."""
    found = disagreements(rows)
    if not found:
        return ""
    sentences = (sentence[0].upper() + sentence[1:] for sentence in disagreement_summary(rows))
    said = "".join(f"<p>{escape(sentence)}.</p>" for sentence in sentences)
    named = ("layer", "ww_status", "ww_alpha", "status", "alpha")
    lines = [[*(text(row, BY_NAME[name]) for name in named), why] for row, why in found]
    tables = [_table(_HEADS, _LEFT, some, "verdicts") for some in (lines[:_SHOWN], lines[_SHOWN:]) if some]
    rest = f"<details><summary>{len(lines) - _SHOWN} more</summary>{tables[1]}</details>" if tables[1:] else ""
    return f"{said}{tables[0]}{rest}"


def _table(heads: Mapping[str, str], left: Container[int], lines: Iterable[Sequence[str]], kind: str) -> str:
    """Return a table as HTML; `left` has the indices of the columns of text, `kind` is its class in the style sheet."""
    sides = ['class="l" ' if i in left else "" for i in range(len(heads))]
    head = "".join(
        f'<th {side}scope="col" title="{escape(meaning)}">{escape(name)}</th>'
        for side, (name, meaning) in zip(sides, heads.items(), strict=True)
    )
    body = "".join(
        f'<tr><th {sides[0]}scope="row">{breakable(first)}</th>'
        f"{''.join(f'<td {side}>{escape(cell)}</td>' for side, cell in zip(sides[1:], rest, strict=True))}</tr>"
        for first, *rest in lines
    )
    return f'<div class="box {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
