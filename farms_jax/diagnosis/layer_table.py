"""A table of layers: its columns, order, and how it is shown and written: text, notebook, data frame, CSV, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from farms_jax._extras import from_extra
from farms_jax._present import data_frame, html_table
from farms_jax.diagnosis.columns import Column, Row, find_column
from farms_jax.diagnosis.status import severity
from farms_jax.diagnosis.table import measured, plain, sheet
from farms_jax.errors import InputError
from farms_jax.programs.files import write_json, write_text

if TYPE_CHECKING:
    import pandas as pd


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
        """The columns that were measured, in their order."""
        return measured(self.layers, self.possible)

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
        with_value = [i for i, key in enumerate(keys) if key is not None]
        order = sorted(with_value, key=lambda i: keys[i], reverse=descending)
        order += [i for i, key in enumerate(keys) if key is None]
        return dataclasses.replace(self, layers=tuple(self.layers[i] for i in order))

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
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(column.name for column in self.columns)
        for row in self.layers:
            writer.writerow(plain(row.get(column.name)) for column in self.columns)
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
        console = Console(highlight=False)
        fitting = sheet(self.layers, self.columns, console.width)
        console.print(self.headline(), style="bold", markup=False)
        console.print(fitting.coloured())
        for line in [*fitting.notes, *self.closing()]:
            console.print(line, style="dim", markup=False)

    def __str__(self) -> str:
        """Return the headline, a table at most 120 characters wide, and the closing lines."""
        return self._text(width=120)

    __repr__ = __str__

    def _text(self, width: int | None) -> str:
        fitting = sheet(self.layers, self.columns, width)
        title, *below = self.headline(), *fitting.notes, *self.closing()
        if width is not None:
            title, *below = (textwrap.fill(line, width, subsequent_indent="  ") for line in (title, *below))
        return "\n".join([title, fitting.plain(), *below])

    def _repr_html_(self) -> str:
        shown = sheet(self.layers, self.columns, None)
        heads = {column.head: column.meaning for column in shown.columns}
        lines = [*shown.notes, *self.closing()]
        return html_table(heads, shown.cells, lines, title=self.headline(), left=shown.left)
