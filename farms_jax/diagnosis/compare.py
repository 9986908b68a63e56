"""compare(): what changed from one model to another, layer by layer."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from farms_jax._tail import Tail
from farms_jax.diagnosis.columns import BY_NAME, Column, Row, half_width, text
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.pipeline import diagnose, layers_of, opened
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.table import LayerTable
from farms_jax.errors import InputError, listed
from farms_jax.weights import LoraSource, WeightSource, is_lora

_BEFORE_AND_AFTER = ("alpha", "whole_alpha", "ww_alpha", "ks_distance", "whole_stable_rank", "mp_spikes", "rank")
_SHOWN = {"alpha", "mp_spikes"}  # of these, in the terminal


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
        *(
            Column(
                f"{name}_{side}", f"{meaning}; of {side.upper()}", format, f"{head}_{side}" if name in _SHOWN else ""
            )
            for name, meaning, format, head, *_ in (BY_NAME[name] for name in _BEFORE_AND_AFTER)
            for side in ("a", "b")
        ),
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
        sides = (("A", self.only_a), ("B", self.only_b))
        return [f"only in {side}: {listed(names, 5, ', ')}" for side, names in sides if names]


def compare(a: Any, b: Any, *, progress: bool = False, **options: Any) -> Comparison:
    """Measure two models and set them side by side, what moved most first.

    >>> import farms_jax, numpy as np
    >>> before = np.random.default_rng(0).normal(size=(64, 96))
    >>> after = before + 3 * np.outer(np.ones(64), np.ones(96)) / 8
    >>> [row["beyond_error"] for row in farms_jax.compare({"dense": before}, {"dense": after}).layers]
    [False]

    Args:
        a: the model before: path, open `WeightSource`, pytree, `Diagnosis`, or path of a diagnosis in JSON.
        b: the model after, likewise, or the folder of a LoRA adapter of `a`, whose change is then added to `a`.
        progress: show progress bars, where the standard error is a terminal.
        **options: options of `diagnose`, the same for both.

    Returns:
        The comparison of the layers that both have under one name.

    Raises:
        InputError: a model cannot be read, or they have no layer in common.
        ValueError: an option is out of its range.
    """
    with contextlib.ExitStack() as opening:
        before, weights_a = _side(a, opening, progress=progress, **options)
        if isinstance(b, str | Path) and is_lora(b):
            if weights_a is None:
                raise InputError(
                    f"{b}: a LoRA adapter needs the weights of its base model; give them as the first model"
                )
            b = opening.enter_context(LoraSource(weights_a, Path(b)))
        after, weights_b = _side(b, opening, progress=progress, **options)
        rows_a, rows_b = ({row["layer"]: row for row in side.layers} for side in (before, after))
        common = [name for name in rows_a if name in rows_b]
        if not common:
            raise InputError(
                f"{before.model} and {after.model} have no layer of one name: {next(iter(rows_a))} in the first, "
                f"{next(iter(rows_b))} in the second; give two checkpoints of one model or family, in one format"
            )
        moved = dict(_moved(weights_a, weights_b, common, progress=progress)) if weights_a and weights_b else {}
    comparison = Comparison(
        layers=tuple(_row(rows_a[name], rows_b[name], moved.get(name)) for name in common),
        models=(before.model, after.model),
        only_a=tuple(name for name in rows_a if name not in rows_b),
        only_b=tuple(name for name in rows_b if name not in rows_a),
    )
    return comparison.sort("alpha_change", descending=True, magnitude=True)


def _side(model: Any, opening: contextlib.ExitStack, **options: Any) -> tuple[Diagnosis, WeightSource | None]:
    """Return a model's diagnosis and its weights, open as long as `opening`; of a written diagnosis there are none."""
    if isinstance(model, Diagnosis):
        return model, None
    if isinstance(model, str | Path) and Path(model).suffix == ".json":
        return Diagnosis.read_json(Path(model)), None
    source = opening.enter_context(opened(model, options.get("axes"), options.get("stack")))
    return diagnose(source, **options), source


def _moved(a: WeightSource, b: WeightSource, names: list[str], *, progress: bool) -> Iterator[tuple[str, float]]:
    """Yield |B - A| / |A| of the layers that have one shape in both."""
    places_a, places_b = (layers_of(source, Settings(tail=Tail(min_count=2)))[0] for source in (a, b))
    # One tensor after the other: a stack may be read as a whole.
    common = set(names)
    names = [name for name in places_a if name in common]
    for name in tqdm(names, desc="compare", unit="layer", leave=False, disable=None if progress else True):
        first, second = places_a[name].read(a), places_b[name].read(b)
        if first.shape == second.shape:
            exact = np.result_type(first.dtype, second.dtype, np.float32)
            first = first.astype(exact, copy=False)
            size = float(np.linalg.norm(first))
            change = float(np.linalg.norm(second.astype(exact, copy=False) - first))
            yield name, change / size if size else float(change > 0)


def _row(a: Row, b: Row, moved: float | None) -> Row:
    row: dict[str, Any] = {"layer": a["layer"]}
    for name in ("status", "shape"):
        before, after = (text(side, BY_NAME[name]) for side in (a, b))
        row[name] = before if before == after else f"{before} -> {after}"
    if moved is not None:
        row["moved"] = moved
    alphas = a["alpha"], b["alpha"]
    row["alpha_change"] = change = None if None in alphas else alphas[1] - alphas[0]
    widths = [width for side in (a, b) if (width := half_width(side)) is not None]
    if change is not None and len(widths) == 2:
        row["error"] = float(np.linalg.norm(widths))
        row["beyond_error"] = abs(change) > row["error"]
    for name in _BEFORE_AND_AFTER:
        if name in a and name in b:
            row |= {f"{name}_a": a[name], f"{name}_b": b[name]}
    return row
