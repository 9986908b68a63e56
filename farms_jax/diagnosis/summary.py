"""What a diagnosis says in a line: how many layers of each status, and which to look at first."""

from collections import Counter
from collections.abc import Iterable, Sequence

from farms_jax._present import left_out_lines
from farms_jax.diagnosis.columns import BY_NAME
from farms_jax.diagnosis.status import MEANINGS
from farms_jax.diagnosis.table import Row, number, with_interval

GOOD = "well trained"
_EXPLAINED = 5  # layers whose reason is given below the table
# The faults that spoil results most come first.
SEVERITY: tuple[str, ...] = ("degenerate", "over-correlated", "undertrained", GOOD)


def severity(status: str | None) -> int:
    """Return the place of a status among all, 0 for the one that needs attention most; unknown ones come last."""
    return SEVERITY.index(status) if status in SEVERITY else len(SEVERITY)


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Count the layers of each status, those that need attention first; layers without one are not counted."""
    found = Counter(str(row["status"]) for row in rows if row.get("status"))
    return {status: found[status] for status in sorted(found, key=severity)}


def attention(rows: Sequence[Row]) -> list[Row]:
    """Return the layers that are not well trained, the worst first.

    Over-correlated layers start with the smallest alpha, undertrained ones with the largest.
    """

    def worst(row: Row) -> tuple[int, float]:
        alpha = number(row, "alpha") or 0.0
        return severity(row.get("status")), -alpha if row.get("status") == "undertrained" else alpha

    return sorted((row for row in rows if row.get("status") in MEANINGS and row["status"] != GOOD), key=worst)


def summary(model: str, rows: Sequence[Row]) -> str:
    """Say in one line what needs attention.

    >>> summary("net", [{"layer": "head", "status": "undertrained", "alpha": 2.13}])
    'net: 1 layer, 1 undertrained; look first at head (undertrained, alpha 2.130)'

    Args:
        model: its name.
        rows: one per layer.

    Returns:
        The line.
    """
    parts = [f"{len(rows)} layer{'' if len(rows) == 1 else 's'}"]
    parts += [f"{count} {status}" for status, count in counts(rows).items()]
    line = f"{model}: {', '.join(parts)}"
    for row in attention(rows)[:1]:
        alpha = f", alpha {with_interval(row, BY_NAME['alpha'])}" if number(row, "alpha") else ""
        line += f"; look first at {row['layer']} ({row['status']}{alpha})"
    return line


def closing(rows: Sequence[Row], left_out: Iterable[tuple[str, str]]) -> list[str]:
    """Say what stands below a table: meanings of its statuses, reasons of the worst layers, what was left out.

    Args:
        rows: one per layer.
        left_out: (name, reason) of the arrays that are no layers.

    Returns:
        Lines.
    """
    meanings = [f"{status}: {MEANINGS[status]}" for status in counts(rows) if status in MEANINGS]
    reasons = [f"{row['layer']}: {row['reason']}" for row in attention(rows)[:_EXPLAINED] if row.get("reason")]
    return [*meanings, *reasons, *left_out_lines(left_out)]
