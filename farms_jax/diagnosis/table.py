"""Rows of columns as text: one cell, a table that fits a width, and the same in the colours of a terminal."""

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from farms_jax._present import common_prefix, optional, shorten, text_table
from farms_jax.diagnosis.columns import BY_NAME, Column

Row = Mapping[str, Any]

MISSING = "–"
_STYLES = {"well trained": "green", "undertrained": "yellow", "over-correlated": "magenta", "degenerate": "bold red"}
_GAP = 2  # spaces between columns
_LEAST_NAME = 24  # characters that a shortened name keeps, where the table can give up columns instead
# Where the table is too wide, these go first; columns that stand nowhere here stay.
_GIVEN_UP = (
    *("whole_stable_rank", "ks_distance", "ww_alpha", "mp_spikes", "shape", "rank_flips", "rank", "whole_alpha"),
    *("aspect_ratio_bias", "noise_alpha"),
)


class Sheet(NamedTuple):
    """A table that fits.

    Attributes:
        columns: those that are shown.
        cells: row by row.
        notes: what the table does not say itself, line by line.
    """

    columns: list[Column]
    cells: list[list[str]]
    notes: list[str]

    @property
    def heads(self) -> list[str]:
        """Heads of the columns."""
        return [column.head for column in self.columns]

    @property
    def left(self) -> set[int]:
        """Indices of the columns of text, which are set to the left."""
        return {i for i, column in enumerate(self.columns) if not column.format}


def plain(value: Any) -> Any:
    """Return a value as JSON and CSV have it: Python numbers, lists; `None` for what is NaN or infinite."""
    if hasattr(value, "tolist"):  # NumPy's and JAX's
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(row: Row, name: str) -> float | None:
    """Return a row's number to draw or to compare; `None` where there is none."""
    value = plain(row.get(name))
    return float(value) if isinstance(value, (int, float)) else None


def half_width(row: Row) -> float | None:
    """Return half the confidence interval of `alpha`; `None` where there is none."""
    low, high = number(row, "alpha_low"), number(row, "alpha_high")
    return None if low is None or high is None else (high - low) / 2


def text(row: Row, column: Column) -> str:
    """Format one value.

    >>> text({"Q": 1.5}, BY_NAME["Q"]), text({}, BY_NAME["Q"])
    ('1.5', '–')

    Args:
        row: row of the layer.
        column: column of the value.

    Returns:
        The text; `–` where there is no value.
    """
    value = plain(row.get(column.name))
    if value is None or value == "":
        return MISSING
    if isinstance(value, (str, bool)) or not column.format:
        return str(value)
    return format(int(value) if column.format == "d" else value, column.format)


def with_interval(row: Row, column: Column) -> str:
    """Format one value, `alpha` with half its confidence interval: `1.87 ±0.03`."""
    half = half_width(row) if column.name == "alpha" else None
    if half is None or number(row, column.name) is None:
        return text(row, column)
    return f"{row[column.name]:.2f} ±{half:.2f}"


def measured(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """Return the columns of which at least one row has a value."""
    return [column for column in columns if any(plain(row.get(column.name)) is not None for row in rows)]


def sheet(rows: Sequence[Row], columns: Sequence[Column], width: int | None) -> Sheet:
    """Lay out the short columns of a table.

    A noise level that all layers share becomes a note. Where the table is too wide, the beginning that all names share
    is said once, then columns are given up, then names are cut in the middle.

    Args:
        rows: one per layer.
        columns: in order; those without a short head are left out.
        width: in characters; `None` for as many as it takes.

    Returns:
        The sheet.
    """
    shown = [column for column in measured(rows, columns) if column.head]
    notes = []
    levels = {text(row, BY_NAME["noise_alpha"]) for row in rows} - {MISSING}
    if len(levels) == 1:
        shown = [column for column in shown if column.name != "noise_alpha"]
        notes.append(f"alpha of noise: {levels.pop()}")
    cells = {column.name: [with_interval(row, column) for row in rows] for column in shown}
    needs = {c.name: max(map(len, [c.head, *cells[c.name]])) + _GAP for c in shown if c.name != "layer"}
    names = cells.get("layer", [])
    longest = max([len("layer"), *map(len, names)])
    if width is not None and longest + sum(needs.values()) > width:
        names, prefix = _without_prefix(names)
        notes += [f"all names begin with {prefix}"] if prefix else []
        longest = max([len("layer"), *map(len, names)])
        for name in _GIVEN_UP:
            if min(longest, _LEAST_NAME) + sum(needs.values()) <= width:
                break
            needs.pop(name, None)
        room = max(8, width - sum(needs.values()))
        names = [shorten(name, room) for name in names]
    kept = [column for column in shown if column.name in needs or column.name == "layer"]
    cells["layer"] = names
    return Sheet(kept, [list(line) for line in zip(*(cells[column.name] for column in kept), strict=True)], notes)


def _without_prefix(names: list[str]) -> tuple[list[str], str]:
    prefix = common_prefix(names)
    return [name[len(prefix) :] for name in names], prefix


def show_table(
    rows: Sequence[Row], columns: Sequence[Column], title: str, lines: Sequence[str] = (), *, file: TextIO | None = None
) -> None:
    """Print a table of layers.

    Args:
        rows: one per layer.
        columns: in order; those with a short head are shown.
        title: line above it.
        lines: to stand below it.
        file: where to; by default the standard output.
    """
    out = sys.stdout if file is None else file
    if not out.isatty():
        out.write(plain_text(rows, columns, title, lines, width=None) + "\n")
        return
    console = optional("rich.console").Console(file=out, highlight=False)
    chosen = sheet(rows, columns, console.width)
    console.print(title, style="bold", markup=False)
    console.print(_coloured(chosen))
    for line in [*chosen.notes, *lines]:
        console.print(line, style="dim", markup=False)


def plain_text(
    rows: Sequence[Row], columns: Sequence[Column], title: str, lines: Sequence[str] = (), *, width: int | None = 120
) -> str:
    """Set what `show_table` prints as plain text.

    Args:
        rows: one per layer.
        columns: in order; those with a short head are shown.
        title: line above it.
        lines: to stand below it.
        width: of the table in characters; `None` for as many as it takes.

    Returns:
        Lines.
    """
    chosen = sheet(rows, columns, width)
    below = [*chosen.notes, *lines]
    if width is not None:
        title, *below = (textwrap.fill(line, width, subsequent_indent="  ") for line in (title, *below))
    return "\n".join([title, text_table(chosen.heads, chosen.cells, left=chosen.left), *below])


def _coloured(chosen: Sheet) -> Any:
    Table, Text = optional("rich.table").Table, optional("rich.text").Text  # noqa: N806 (classes)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    for i, head in enumerate(chosen.heads):
        table.add_column(head, justify="left" if i in chosen.left else "right", no_wrap=True)
    for line in chosen.cells:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
    return table
