"""Comparison: two models side by side, layer by layer."""

import dataclasses
from typing import ClassVar

from farms_jax.diagnosis.columns import BY_NAME, Column
from farms_jax.diagnosis.layer_table import LayerTable

BEFORE_AND_AFTER = ("alpha", "whole_alpha", "ww_alpha", "ks_distance", "whole_stable_rank", "mp_spikes", "rank")
_SHOWN = {"alpha", "mp_spikes"}


def _sides(name: str) -> tuple[Column, ...]:
    column = BY_NAME[name]
    head = column.head if name in _SHOWN else ""
    return tuple(
        Column(f"{name}_{side}", f"{column.meaning}; of {side.upper()}", column.format, head and f"{head}_{side}")
        for side in ("a", "b")
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(LayerTable):
    """Two models, A before and B after; `layers` has what both have under one name.

    Attributes:
        models: names of A and B.
        only_a: layers of A alone.
        only_b: layers of B alone.
    """

    possible: ClassVar[tuple[Column, ...]] = (
        BY_NAME["layer"],
        Column("status", "status, in A -> in B where it changed", "", "status"),
        BY_NAME["shape"],
        Column("moved", "difference of the weights over their size: |B - A| / |A|, Frobenius", ".3g", "moved"),
        Column("alpha_change", "alpha of B less that of A", "+.3f", "change"),
        Column("error", "half the confidence interval of that change", ".3f", "error"),
        Column("beyond_error", "whether the change is larger than its error", ""),
        *(column for name in BEFORE_AND_AFTER for column in _sides(name)),
    )

    models: tuple[str, str]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def headline(self) -> str:
        """Return how many layers moved, in a line."""
        tested = [row["beyond_error"] for row in self.layers if "beyond_error" in row]
        beyond = f", {sum(tested)} with a change of alpha beyond its error" if tested else ""
        same = sum(row.get("moved") == 0 for row in self.layers)
        unchanged = f", {same} with the same weights" if same else ""
        return f"A {self.models[0]}, B {self.models[1]}: {len(self)} layers of one name{beyond}{unchanged}"

    def closing(self) -> list[str]:
        """Return the layers that one model alone has."""
        return [
            f"only in {side}: {', '.join(names[:5])}{f', and {len(names) - 5} more' if len(names) > 5 else ''}"
            for side, names in (("A", self.only_a), ("B", self.only_b))
            if names
        ]
