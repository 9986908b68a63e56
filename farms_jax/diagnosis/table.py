"""A table of layers: its columns, order, and how it is shown and written: text, notebook, data frame, CSV, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from farms_jax._extras import from_extra
from farms_jax._modules import network_order
from farms_jax._names import natural_key
from farms_jax._present import common_prefix, data_frame, html_table, shorten, text_table
from farms_jax.diagnosis.columns import BY_NAME, MISSING, Column, Row, find_column, number, plain, text, with_interval
from farms_jax.diagnosis.resampling import order_is_noise
from farms_jax.diagnosis.status import severity
from farms_jax.errors import InputError
from farms_jax.programs.files import write_json, write_text

if TYPE_CHECKING:
    import pandas as pd

_STYLES = {"well trained": "green", "undertrained": "yellow", "over-correlated": "magenta", "degenerate": "bold red"}
_STYLES |= {"spiked": "blue", "flat": "cyan", "too few to say": "dim"}
SHORT = 20  # layers, up to which a table fits on a screen
_GAP = 2  # spaces between columns
_LEAST_NAME = 24  # characters that a shortened name keeps while there are columns to drop
# Columns dropped from a table that is too wide, in this order; others stay.
_DROPPED = (
    *("whole_stable_rank", "ks_distance", "ww_alpha", "mp_spikes", "shape", "rank_flips", "rank", "whole_alpha"),
    *("aspect_ratio_bias", "median_alpha", "noise_alpha"),
)


class Layout(NamedTuple):
    """A table, ready to be shown."""

    heads: dict[str, str]  # short name of each shown column: its meaning
    left: set[int]  # indices of the columns of text, which are set to the left
    cells: Sequence[Sequence[str]]  # row by row
    notes: Sequence[str] = ()  # what the table leaves out


class Part(NamedTuple):
    """A part of what is shown: a title, lines of text, lines of code, or a table."""

    kind: Literal["title", "text", "step", "code", "table"]
    lines: Sequence[str] = ()
    table: Layout | None = None


def show_parts(parts: Callable[[int | None], Sequence[Part]]) -> None:
    """Print parts of a width: coloured and as wide as the terminal, plain and of any width into a file."""
    if not sys.stdout.isatty():
        sys.stdout.write(text_of(parts(None), None) + "\n")
        return
    with from_extra("diagnose"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    console = Console(highlight=False)
    for part in parts(console.width):
        if part.table:
            table = Table(box=None, padding=(0, _GAP, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
            for i, head in enumerate(part.table.heads):
                table.add_column(head, justify="left" if i in part.table.left else "right", no_wrap=True)
            for line in part.table.cells:
                table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
            console.print(table)
        style = {"title": "bold", "text": "dim", "code": "cyan"}.get(part.kind, "")
        for line in part.lines:
            console.print(line, style=style, markup=False, soft_wrap=part.kind == "code")


def text_of(parts: Sequence[Part], width: int | None) -> str:
    """Return parts as plain text; sentences are broken at `width`, code never is."""
    found = []
    for part in parts:
        if part.table:
            found.append(text_table(list(part.table.heads), part.table.cells, left=part.table.left))
        broken = width is not None and part.kind != "code"
        found += [
            textwrap.fill(line, width or 0, subsequent_indent="     " if part.kind == "step" else "  ")
            if broken
            else line
            for line in part.lines
        ]
    return "\n".join(found)


def _html_of(part: Part) -> str:
    if part.table:
        return html_table(part.table.heads, part.table.cells, left=part.table.left)
    tag = {"title": "b", "code": "code"}.get(part.kind, "span")
    return "".join(f'<div style="opacity:.85"><{tag}>{escape(line)}</{tag}></div>' for line in part.lines)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerTable:
    """Rows of layers under known columns: the base of `Diagnosis` and `Comparison`.

    Attributes:
        layers: one row per layer, `{column: value}`. A column that was not measured is missing; a number that does not
            exist for a layer is `None`.
    """

    possible: ClassVar[tuple[Column, ...]]

    layers: tuple[Row, ...]

    def headline(self) -> str:
        """Return the line above the table."""
        raise NotImplementedError

    def closing(self) -> list[str]:
        """Return the lines below the table."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return L, the number of layers."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(row["layer"] for row in self.layers)

    @property
    def columns(self) -> list[Column]:
        """The columns that have a value in at least one layer, in their order."""
        return [
            column for column in self.possible if any(plain(row.get(column.name)) is not None for row in self.layers)
        ]

    def column(self, name: str) -> list[Any]:
        """Return one column, L values; `None` where a layer has none.

        Args:
            name: name of the column, or its head in the terminal.

        Raises:
            InputError: there is no such column, or it was not measured.
        """
        name = find_column(name, self.possible).name
        if not any(name in row for row in self.layers):
            raise InputError(f"column {name!r} was not measured; it needs other settings (whole, randomize, resamples)")
        return [row.get(name) for row in self.layers]

    def sort(self, name: str, *, descending: bool = False, magnitude: bool = False) -> Self:
        """Order the layers by a column; equal ones keep their order, layers without a value come last.

        Args:
            name: name of the column, or its head in the terminal; by `status`, those that need attention come first.
            descending: the largest first.
            magnitude: whatever the sign.

        Returns:
            The same table with its layers in that order.

        Raises:
            InputError: there is no such column, or it was not measured.
        """
        keys = [severity(value) if name == "status" else plain(value) for value in self.column(name)]
        if magnitude:
            keys = [abs(key) if isinstance(key, (int, float)) else key for key in keys]
        pairs = list(zip(keys, self.layers, strict=True))
        ordered = sorted((pair for pair in pairs if pair[0] is not None), key=lambda pair: pair[0], reverse=descending)
        ordered += [pair for pair in pairs if pair[0] is None]
        return dataclasses.replace(self, layers=tuple(row for _, row in ordered))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{layer: {column: value}}`, of Python values, ready for JSON; every layer has all columns."""
        names = [column.name for column in self.columns if column.name != "layer"]
        return {row["layer"]: {name: plain(row.get(name)) for name in names} for row in self.layers}

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame, indexed by layer.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.to_dict())

    def write_csv(self, path: str | Path) -> None:
        """Write one line per layer; numbers with all their digits, missing ones empty."""
        lines, names = io.StringIO(newline=""), [column.name for column in self.columns]
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerows([names, *([plain(row.get(name)) for name in names] for row in self.layers)])
        write_text(Path(path), lines.getvalue())

    def write_json(self, path: str | Path) -> None:
        """Write everything."""
        write_json(Path(path), plain({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}))

    def parts(self, width: int | None) -> list[Part]:
        """Return what is shown, from top to bottom, with a table in `width` characters; `None` for any width."""
        layout = self._layout(width)
        title, below = Part("title", [self.headline()]), Part("text", [*layout.notes, *self.closing()])
        # Of a long table the first line is no longer on the screen.
        return [title, Part("table", table=layout), below, *([title] if len(self) > SHORT else [])]

    def show(self) -> None:
        """Print: coloured and as wide as the terminal, plain where the output goes to a file."""
        show_parts(self.parts)

    def __str__(self) -> str:
        """Return what `show` prints, at most 120 characters wide."""
        return text_of(self.parts(120), 120)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(map(_html_of, self.parts(None)))

    def _by_depth(self) -> list[Row]:
        """Return the layers in network order, however the table was sorted."""
        order = network_order(sorted(self.names, key=natural_key))
        place = {name: i for i, name in enumerate(order, start=1)}  # for rows that were made without
        return sorted(self.layers, key=lambda row: row.get("place") or place[row["layer"]])

    @staticmethod
    def _check_plot(kind: str, kinds: Sequence[str], layer: str | None) -> None:
        """Check the arguments of `plot`; a layer is of its spectrum alone."""
        if kind not in kinds:
            *others, last = map(repr, kinds)
            raise InputError(f"plot: there is no kind {kind!r}; there are {', '.join(others)} and {last}")
        if layer is not None and kind != "spectrum":
            raise InputError(f"plot: kind {kind!r} shows all layers; leave out `layer`, or take kind 'spectrum'")

    def _layout(self, width: int | None) -> Layout:
        """Return the columns that have a head, laid out in `width` characters; `None` for any width.

        A noise level that all layers share becomes a note, and so do ranks that are noise. Where the table is too wide,
        the prefix that all names share becomes one, then columns are dropped, then names are shortened in the middle.
        """
        shown, notes = [column for column in self.columns if column.head], []
        flips = order_is_noise([number(row, "rank_flips") for row in self.layers])
        if flips is not None:
            shown = [column for column in shown if column.name not in {"rank", "rank_flips"}]
            notes.append(
                f"the order of the layers by alpha is noise: ranks change in {flips:.0%} of resamples (median)"
            )
        levels = {text(row, BY_NAME["noise_alpha"]) for row in self.layers} - {MISSING}
        if len(levels) == 1:
            shown = [column for column in shown if column.name != "noise_alpha"]
            rule = " by the median rule" if BY_NAME["median_alpha"] in self.columns else ""
            notes.append(f"alpha of noise{rule}: {levels.pop()}")
        cells = {column.name: [with_interval(row, column) for row in self.layers] for column in shown}
        widths = {column.name: _GAP + max(map(len, [column.head, *cells[column.name]])) for column in shown}
        if width is not None and sum(widths.values()) - _GAP > width:
            prefix = common_prefix(cells["layer"])
            notes += [f"all names begin with {prefix}"] if prefix else []
            names = [name.removeprefix(prefix) for name in cells["layer"]]
            longest = max(map(len, ["layer", *names]))
            del widths["layer"]  # which gets what the others leave
            for name in _DROPPED:
                if min(longest, _LEAST_NAME) + sum(widths.values()) <= width:
                    break
                widths.pop(name, None)
            shown = [column for column in shown if column.name in {"layer", *widths}]
            cells["layer"] = [shorten(name, max(8, width - sum(widths.values()))) for name in names]
        heads = {column.head: column.meaning for column in shown}
        left = {i for i, column in enumerate(shown) if not column.format}
        return Layout(heads, left, list(zip(*(cells[column.name] for column in shown), strict=True)), notes)
