"""A table of layers: its columns, order, and how it is shown and written: text, notebook, data frame, CSV, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from farms_jax._extras import from_extra
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
_GAP = 2  # spaces between columns
_LEAST_NAME = 24  # characters that a shortened name keeps while there are columns to drop
# Columns dropped from a table that is too wide, in this order; others stay.
_DROPPED = (
    *("whole_stable_rank", "ks_distance", "ww_alpha", "mp_spikes", "shape", "rank_flips", "rank", "whole_alpha"),
    *("aspect_ratio_bias", "noise_alpha"),
)


class _Layout(NamedTuple):
    heads: dict[str, str]  # short name of each shown column: its meaning
    left: set[int]  # indices of the columns of text, which are set to the left
    cells: list[tuple[str, ...]]  # row by row
    notes: list[str]  # what the table leaves out


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

    def show(self) -> None:
        """Print the table: coloured and as wide as the terminal, plain where the output goes to a file."""
        if not sys.stdout.isatty():
            sys.stdout.write(self._text(width=None) + "\n")
            return
        with from_extra("diagnose"):
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        console = Console(highlight=False)
        heads, left, cells, notes = self._layout(console.width)
        table = Table(box=None, padding=(0, _GAP, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i in left else "right", no_wrap=True)
        for line in cells:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
        console.print(self.headline(), style="bold", markup=False)
        console.print(table)
        for line in [*notes, *self.closing()]:
            console.print(line, style="dim", markup=False)

    def __str__(self) -> str:
        """Return the headline, a table at most 120 characters wide, and the closing lines."""
        return self._text(width=120)

    __repr__ = __str__

    def _text(self, width: int | None) -> str:
        heads, left, cells, notes = self._layout(width)
        title, *below = self.headline(), *notes, *self.closing()
        if width is not None:
            title, *below = (textwrap.fill(line, width, subsequent_indent="  ") for line in (title, *below))
        return "\n".join([title, text_table(list(heads), cells, left=left), *below])

    def _repr_html_(self) -> str:
        heads, left, cells, notes = self._layout(None)
        return html_table(heads, cells, [*notes, *self.closing()], title=self.headline(), left=left)

    def _layout(self, width: int | None) -> _Layout:
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
            notes.append(f"alpha of noise: {levels.pop()}")
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
        return _Layout(heads, left, list(zip(*(cells[column.name] for column in shown), strict=True)), notes)
