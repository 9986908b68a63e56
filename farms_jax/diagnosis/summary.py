"""Layers summed up: by the type of module, and of a whole model, to rank models by."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from farms_jax.diagnosis.columns import MISSING, Row, number
from farms_jax.diagnosis.status import counts


class Group(NamedTuple):
    """Layers of one type, or of one block."""

    name: str
    rows: list[Row]

    @property
    def alphas(self) -> list[float]:
        """The alphas of the layers that have one."""
        return [alpha for row in self.rows if (alpha := number(row, "alpha")) is not None]

    @property
    def num_params(self) -> int:
        """Parameters in these layers."""
        return sum(int(number(row, "num_params") or 0) for row in self.rows)

    def alpha(self) -> str:
        """Return the mean alpha with its standard deviation over the layers, as text."""
        alphas = self.alphas
        if not alphas:
            return MISSING
        spread = f" ±{statistics.pstdev(alphas):.2f}" if len(alphas) > 1 else ""
        return f"{statistics.fmean(alphas):.2f}{spread}"

    def statuses(self) -> str:
        """Return how many layers have which status, the worst first."""
        return ", ".join(f"{count} {status}" for status, count in counts(self.rows).items()) or MISSING

    def cells(self) -> list[str]:
        """Return a line of the table, under `HEADS`."""
        return [self.name, str(len(self.rows)), f"{self.num_params:,}", self.alpha(), self.statuses()]


HEADS = {
    "type": "kind of module, from the names",
    "layers": "how many there are",
    "parameters": "in all of them",
    "alpha": "mean of the layers ± standard deviation over them",
    "statuses": "how many layers have which",
}
WEIGHTWATCHER = (  # what WeightWatcher's `get_summary` has: the means of its columns of these
    "ww_alpha",
    "ww_alpha_hat",
    "ww_log_alpha_norm",
    "whole_log_norm",
    "whole_log_largest_eigenvalue",
    "whole_stable_rank",
    "ww_mp_softrank",
)
LEFT = {0, 4}  # columns of text


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> list[Group]:
    """Return the layers in groups, each at the place of its first layer."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [Group(name, members) for name, members in groups.items()]


def by_type(rows: Iterable[Row]) -> list[Group]:
    """Return the layers by type; rows that were measured without types are of none."""
    return grouped([row for row in rows if row.get("type")], lambda row: row["type"])


def telling_types(rows: Iterable[Row]) -> list[Group]:
    """Return the layers by type where that sums anything up: several types, one of several layers; else nothing."""
    groups = by_type(rows)
    return groups if len(groups) > 1 and any(len(group.rows) > 1 for group in groups) else []


def of_model(rows: Sequence[Row]) -> dict[str, Any]:
    """Return one number for each of a model's measures: means over its layers, and shares of them.

    `alpha_weighted` weighs each layer by its parameters. Layers that lack a number do not count in its mean.
    """
    alphas = [(alpha, number(row, "num_params") or 1) for row in rows if (alpha := number(row, "alpha")) is not None]
    found: dict[str, Any] = {"layers": len(rows), "num_params": Group("", list(rows)).num_params}
    found["alpha"] = statistics.fmean(alpha for alpha, _ in alphas) if alphas else None
    found["alpha_weighted"] = sum(a * n for a, n in alphas) / sum(n for _, n in alphas) if alphas else None
    for name in ("whole_alpha", *WEIGHTWATCHER):
        values = [value for row in rows if (value := number(row, name)) is not None]
        found[name] = statistics.fmean(values) if values else None
    return found | {status.replace(" ", "_").replace("-", "_"): count for status, count in counts(rows).items()}
