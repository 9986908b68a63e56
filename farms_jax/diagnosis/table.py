"""Rows of columns as text: one cell, and a table of limited width that terminals and `str` share."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from farms_jax._present import common_prefix, shorten
from farms_jax.diagnosis.columns import BY_NAME, Column

Row = Mapping[str, Any]

MISSING = "–"
NO_TAIL = "no tail"
# Of a tail, and of models A and B in a comparison: above 1, and 0 where there is no tail.
_EXPONENT = re.compile(r"((whole_|ww_)?alpha|alpha_low|alpha_high)(_[ab])?")
_GAP = 2  # spaces between columns
_LEAST_NAME = 24  # characters that a shortened name keeps, where the table can give up columns instead
# Where the table is too wide, these go first; columns that stand nowhere here stay.
_GIVEN_UP = (
    *("whole_stable_rank", "ks_distance", "ww_alpha", "mp_spikes", "shape", "rank_flips", "rank", "whole_alpha"),
    *("aspect_ratio_bias", "noise_alpha"),
)
_LEFT = {"layer", "status", "shape", "reason"}


class Sheet(NamedTuple):
    """A table that fits.

    Attributes:
        columns: those that are shown.
        heads: one per column.
        cells: row by row.
        left: indices of the columns that are set to the left.
        notes: what the table does not say itself, line by line.
    """

    columns: list[Column]
    heads: list[str]
    cells: list[list[str]]
    left: set[int]
    notes: list[str]


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
    """Return a row's number to draw or to compare; `None` where there is none, or the spectrum has no tail."""
    value = plain(row.get(name))
    if not isinstance(value, (int, float)) or (value == 0 and _EXPONENT.fullmatch(name)):
        return None
    return float(value)


def half_width(row: Row) -> float | None:
    """Return half the confidence interval of `alpha`; `None` where there is none."""
    low, high = number(row, "alpha_low"), number(row, "alpha_high")
    return None if low is None or high is None else (high - low) / 2


def text(row: Row, column: Column) -> str:
    """Format one value.

    >>> text({"Q": 1.5}, BY_NAME["Q"]), text({"shape": (64, 32)}, BY_NAME["shape"]), text({}, BY_NAME["Q"])
    ('1.5', '64x32', '–')

    Args:
        row: the layer's.
        column: which value.

    Returns:
        The value; `no tail` for an alpha of 0, `–` where there is none.
    """
    value = plain(row.get(column.name))
    if value is None or value == "":
        return MISSING
    if isinstance(value, list):
        return "x".join(map(str, value))
    if isinstance(value, (str, bool)) or not column.format:
        return str(value)
    if value == 0 and _EXPONENT.fullmatch(column.name):
        return NO_TAIL
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
    return Sheet(
        columns=kept,
        heads=[column.head for column in kept],
        cells=[list(line) for line in zip(*(cells[column.name] for column in kept), strict=True)],
        left={i for i, column in enumerate(kept) if column.name in _LEFT},
        notes=notes,
    )


def _without_prefix(names: list[str]) -> tuple[list[str], str]:
    prefix = common_prefix(names)
    return [name[len(prefix) :] for name in names], prefix
