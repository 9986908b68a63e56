"""The findings of the page, above its charts: what to do now, and the layers by type."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from farms_jax.diagnosis.columns import Row
from farms_jax.diagnosis.steps import Step
from farms_jax.diagnosis.summary import HEADS, telling_types


def findings(rows: Sequence[Row], steps: Sequence[Step]) -> str:
    """Return the sections as HTML; empty ones are left out."""
    groups = telling_types(rows)
    types = _table(HEADS, (group.cells() for group in groups)) if groups else ""
    sections = [
        _section("What to do now", f'<ol class="steps">{"".join(map(_step, steps))}</ol>' if steps else ""),
        _section("By type", types),
    ]
    return f'<div class="findings">{"".join(sections)}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _step(step: Step) -> str:
    code = f"<pre>{escape(chr(10).join(step.code))}</pre>" if step.code else ""
    return (
        f"<li><b>{escape(step.found)}</b><p><i>usually</i> {escape(step.means)}</p>"
        f"<p><i>try</i> {escape(step.attempt)}</p>{code}</li>"
    )


def _table(heads: Mapping[str, str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" title="{escape(meaning)}">{escape(name)}</th>' for name, meaning in heads.items())
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in lines
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
