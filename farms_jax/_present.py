"""How a table of layers is shown: as text, in a notebook, as a data frame.

>>> print(text_table(["layer", "alpha"], [["dense", "2.1"], ["head", "10.4"]]))
layer  alpha
dense    2.1
head    10.4
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from farms_jax._extras import from_extra
from farms_jax.errors import listed


def shorten(text: str, width: int) -> str:
    """Return a layer's name in at most `width` characters, 3 or more, its middle cut out: its end tells more.

    >>> shorten("model.layers.10.self_attn.q_proj.weight", 24)
    'model.la…n.q_proj.weight'
    """
    if len(text) <= width:
        return text
    end = max(1, (width - 1) * 2 // 3)
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names begin with, up to the last `.` or `/`; empty for fewer than two names.

    >>> common_prefix(["model.layers.0.up", "model.layers.1.up"])
    'model.layers.'
    """
    match = re.match(r".*[./]", os.path.commonprefix(list(names)))
    return match[0] if match and len(names) > 1 else ""


def text_table(heads: Sequence[str], cells: Iterable[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Return a table in plain text, with two spaces between columns and none at the ends of lines.

    `cells` are row by row; `left` has the indices of the columns set to the left, numbers are set to the right.
    """
    lines = [list(heads), *map(list, cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def counted(count: int, thing: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "layer"), counted(2_000, "layer")
    ('1 layer', '2000 layers')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"


def short_count(count: int) -> str:
    """Return a number of parameters in a few characters.

    >>> short_count(134_515_008), short_count(16_384)
    ('135 million', '16,384')
    """
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (name, reason) of the arrays that are not layers: `{reason: [name, ...]}`."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out:
        reasons.setdefault(reason, []).append(name)
    return reasons


def left_out_lines(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """Return what was left out, one line per reason with at most three names.

    >>> left_out_lines([("bias", "1 axes"), ("scale", "1 axes")])
    ['left out (1 axes): bias, scale']
    """
    return [f"left out ({reason}): {listed(names, 3, ', ')}" for reason, names in by_reason(left_out).items()]


def html_table(
    heads: Mapping[str, str],
    cells: Iterable[Sequence[str]],
    lines: Iterable[str] = (),
    *,
    title: str = "",
    left: Collection[int] = (0,),
) -> str:
    """Return a table for a notebook, readable on light and dark pages, scrolling where it is long; texts are escaped.

    `heads` has the meaning of each column, for its tooltip; `lines` stand below the table, `title` above it; `left`
    has the indices of the columns set to the left.
    """
    rule = "border-bottom:1px solid rgba(128,128,128,.35);padding:.25em .7em;white-space:nowrap;text-align:"

    def row(tag: str, texts: Iterable[tuple[str, str]]) -> str:
        return "".join(
            f'<{tag} style="{rule}{"left" if i in left else "right"}"{title}>{escape(text)}</{tag}>'
            for i, (text, title) in enumerate(texts)
        )

    head = row("th", ((name, f' title="{escape(meaning)}"' if meaning else "") for name, meaning in heads.items()))
    body = "".join(f"<tr>{row('td', ((cell, '') for cell in line))}</tr>" for line in cells)
    notes = "".join(f'<div style="opacity:.75">{escape(line)}</div>' for line in lines)
    above = f"<div><b>{escape(title)}</b></div>" if title else ""
    return (
        f'{above}<div style="max-height:34em;overflow:auto"><table style="border-collapse:collapse;'
        f'font-variant-numeric:tabular-nums"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}'
    )


def data_frame(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return `{layer: {column: value}}`, the same columns in all, as a pandas DataFrame indexed by `layer`."""
    with from_extra("diagnose"):
        import pandas
    return pandas.DataFrame(list(rows.values()), index=pandas.Index(list(rows), name="layer"))
