"""Rows as text: one value, and a table that fits a width, plain or in the colours of a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from farms_jax._extras import from_extra
from farms_jax._present import common_prefix, shorten, text_table
from farms_jax.diagnosis.columns import BY_NAME, Column, Row

MISSING = "–"
_STYLES = {"well trained": "green", "undertrained": "yellow", "over-correlated": "magenta", "degenerate": "bold red"}
_GAP = 2  # spaces between columns
_LEAST_NAME = 24  # characters that a shortened name keeps while there are columns to drop
# Columns dropped from a table that is too wide, in this order; others stay.
_DROPPED = (
    *("whole_stable_rank", "ks_distance", "ww_alpha", "mp_spikes", "shape", "rank_flips", "rank", "whole_alpha"),
    *("aspect_ratio_bias", "noise_alpha"),
)


def plain(value: Any) -> Any:
    """Return a value as JSON and CSV have it: Python numbers and lists; `None` for NaN and infinity."""
    if hasattr(value, "tolist"):  # NumPy's and JAX's
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(row: Row, name: str) -> float | None:
    """Return a row's number to draw or to compare; `None` for a missing one."""
    value = plain(row.get(name))
    return float(value) if isinstance(value, (int, float)) else None


def half_width(row: Row) -> float | None:
    """Return half the confidence interval of `alpha`; `None` without one."""
    low, high = number(row, "alpha_low"), number(row, "alpha_high")
    return None if low is None or high is None else (high - low) / 2


def text(row: Row, column: Column) -> str:
    """Return one value as text; `–` for a missing one.

    >>> text({"Q": 1.5}, BY_NAME["Q"]), text({}, BY_NAME["Q"])
    ('1.5', '–')
    """
    value = plain(row.get(column.name))
    if value is None or value == "":
        return MISSING
    if isinstance(value, (str, bool)) or not column.format:
        return str(value)
    return format(int(value) if column.format == "d" else value, column.format)


def with_interval(row: Row, column: Column) -> str:
    """Return one value as text, `alpha` with half its confidence interval: `1.87 ±0.03`."""
    half = half_width(row) if column.name == "alpha" else None
    if half is None or number(row, column.name) is None:
        return text(row, column)
    return f"{row[column.name]:.2f} ±{half:.2f}"


def measured(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """Return the columns that have a value in at least one row."""
    return [column for column in columns if any(plain(row.get(column.name)) is not None for row in rows)]


class Sheet(NamedTuple):
    """A table laid out: columns, cells row by row, and notes on what the table leaves out."""

    columns: list[Column]
    cells: list[list[str]]
    notes: list[str]

    @property
    def left(self) -> set[int]:
        """Indices of the columns of text, which are set to the left."""
        return {i for i, column in enumerate(self.columns) if not column.format}

    def plain(self) -> str:
        """Return the table in plain text."""
        return text_table([column.head for column in self.columns], self.cells, left=self.left)

    def coloured(self) -> Any:
        """Return the table for a `rich` console, statuses in colour."""
        with from_extra("diagnose"):
            from rich.table import Table
            from rich.text import Text
        table = Table(box=None, padding=(0, _GAP, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column.head, justify="left" if i in self.left else "right", no_wrap=True)
        for line in self.cells:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
        return table


def sheet(rows: Sequence[Row], columns: Sequence[Column], width: int | None) -> Sheet:
    """Return the columns that have a head, laid out in `width` characters; `None` for any width.

    A noise level that all layers share becomes a note. Where the table is too wide, the prefix that all names share
    becomes one, then columns are dropped, then names are shortened in the middle.
    """
    shown, notes = [column for column in measured(rows, columns) if column.head], []
    levels = {text(row, BY_NAME["noise_alpha"]) for row in rows} - {MISSING}
    if len(levels) == 1:
        shown = [column for column in shown if column.name != "noise_alpha"]
        notes.append(f"alpha of noise: {levels.pop()}")
    cells = {column.name: [with_interval(row, column) for row in rows] for column in shown}
    widths = {column.name: _GAP + max(map(len, [column.head, *cells[column.name]])) for column in shown}
    if width is not None and sum(widths.values()) - _GAP > width:
        prefix = common_prefix(cells["layer"])
        notes += [f"all names begin with {prefix}"] if prefix else []
        names = [name.removeprefix(prefix) for name in cells["layer"]]
        longest = max(map(len, ["layer", *names]))
        others = {name: size for name, size in widths.items() if name != "layer"}
        for name in _DROPPED:
            if min(longest, _LEAST_NAME) + sum(others.values()) <= width:
                break
            others.pop(name, None)
        shown = [column for column in shown if column.name in {"layer", *others}]
        cells["layer"] = [shorten(name, max(8, width - sum(others.values()))) for name in names]
    return Sheet(shown, [list(line) for line in zip(*(cells[column.name] for column in shown), strict=True)], notes)
