"""compare(): what changed from one model to another, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from tqdm import tqdm

from farms_jax._axes import as_matrices
from farms_jax._extras import from_extra
from farms_jax._present import counted
from farms_jax._tail import Tail
from farms_jax.diagnosis.alignment import alignment
from farms_jax.diagnosis.columns import BY_NAME, Column, Row, half_width, plain, text
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.pipeline import diagnose, layers_of, opened
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.table import LayerTable
from farms_jax.errors import InputError, listed
from farms_jax.programs.files import write_json, write_text
from farms_jax.weights import LoraSource, WeightSource, is_lora
from farms_jax.weights.wrappers import paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE_AND_AFTER = ("alpha", "whole_alpha", "ww_alpha", "ks_distance", "whole_stable_rank", "mp_spikes", "rank")
_SHOWN = {"alpha", "mp_spikes"}  # of these, in the terminal


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(LayerTable):
    """Two models, A before and B after; `layers` has what both have under one name.

    Attributes:
        models: names of A and B.
        only_a: layers of A alone.
        only_b: layers of B alone.
        damaged: "A" or "B" -> layer -> why it could not be measured there: NaN or Inf, or it cannot be read.
        settings: settings of both diagnoses, in types of JSON.
        histograms: spectra before and after, by layer; JSON leaves them out.
    """

    possible: ClassVar[tuple[Column, ...]] = (
        BY_NAME["layer"]._replace(group=""),
        Column("status", "status, in A -> in B where it changed", "", "status"),
        *(BY_NAME[name]._replace(group="") for name in ("shape", "place")),
        Column("moved", "difference of the weights over their size: |B - A| / |A|, Frobenius", ".3g", "moved"),
        Column(
            "left_overlap", "overlap of the leading left (output) singular vectors, in [0, 1]; 1 if none turned", ".3f"
        ),
        Column("right_overlap", "overlap of the leading right (input) singular vectors, in [0, 1]", ".3f"),
        Column("left_angle", "largest principal angle between the spaces of the left ones, in degrees", ".1f"),
        Column("right_angle", "largest principal angle between the spaces of the right ones, in degrees", ".1f"),
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
    damaged: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    histograms: Mapping[str, tuple[Histogram, Histogram]] = dataclasses.field(default_factory=dict)

    def headline(self) -> str:
        """Return how many layers moved, and which most, in a line."""
        tested = [row for row in self.layers if "beyond_error" in row]
        changed = [row for row in tested if row["beyond_error"]]
        beyond = f", {len(changed)} with a change of alpha beyond its error" if tested else ""
        for row in sorted(changed, key=lambda row: -abs(row["alpha_change"]))[:1]:
            beyond += f" (most {row['layer']}, {row['alpha_change']:+.3f})"
        same = sum(row.get("moved") == 0 for row in self.layers)
        unchanged = f", {same} with the same weights" if same else ""
        damaged = "".join(f", {len(layers)} not measured in {side}" for side, layers in self.damaged.items() if layers)
        count = counted(len(self), "layer")
        return f"A {self.models[0]}, B {self.models[1]}: {count} of one name{beyond}{unchanged}{damaged}"

    def closing(self) -> list[str]:
        """Return the settings that are not the usual ones, and the layers that one model alone has."""
        unusual = Settings.from_json(self.settings).differences(Settings()).values() if self.settings else ()
        sides = (("A", self.only_a), ("B", self.only_b))
        lines = [f"only in {side}: {listed(names, 5, ', ')}" for side, names in sides if names]
        lines += [
            f"not measured in {side}: {name}: {reason}"
            for side, layers in self.damaged.items()
            for name, reason in layers.items()
        ]
        return [f"settings here and by default: {'; '.join(unusual)}"] * bool(unusual) + lines

    def write_json(self, path: str | Path) -> None:
        """Write everything but the spectra."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "histograms"]
        write_json(Path(path), plain({name: getattr(self, name) for name in names}))

    def write_html(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else: charts, table, spectra before and after, how it was measured.

        Layers are in network order.

        Raises:
            InputError: Matplotlib is not installed.
        """
        with from_extra("diagnose"):
            from farms_jax.diagnosis.comparison_page import page
        content = page(
            self._by_depth(),
            self.columns,
            self.histograms,
            models=self.models,
            headline=self.headline(),
            settings=self.settings,
            alone={"A": self.only_a, "B": self.only_b},
            damaged=self.damaged,
        )
        write_text(Path(path), content)

    def plot(self, kind: Literal["alpha", "moved", "spectrum"] = "alpha", layer: str | None = None) -> Figure:
        """Draw a figure.

        Args:
            kind: `alpha`: alphas of all layers before and after; `moved`: how far their weights moved; `spectrum`: the
                spectra of one layer before and after.
            layer: name of the layer whose spectra are drawn; by default the first of the table.

        Returns:
            A Matplotlib figure.

        Raises:
            InputError: there is no such kind or layer, or what it needs is not known, or Matplotlib is not installed.
        """
        self._check_plot(kind, ("alpha", "moved", "spectrum"), layer)
        name = self.names[0] if layer is None else layer
        needed = {"alpha": "alpha_change", "moved": "moved"}.get(kind)
        if needed and not any(row.get(needed) is not None for row in self.layers):
            raise InputError(
                f"plot: no layer has {needed}, which kind {kind!r} shows; compare the weights of both models"
            )
        if kind == "spectrum" and name not in self.histograms:
            raise InputError(f"plot: there is no layer {name!r} with spectra; `names` has all layers")
        with from_extra("diagnose"):
            from farms_jax.diagnosis import comparison_figures as figures
            from farms_jax.diagnosis.figures import NARROW, axes
        title = " → ".join(self.models)
        if kind == "spectrum":
            drawing, axis = axes(f"{name}: {title}", NARROW)
            figures.two_spectra(axis, *self.histograms[name])
            axis.legend(fontsize="small")
        else:
            drawing, axis = axes(
                f"{title}: {'alpha' if kind == 'alpha' else 'difference of the weights over their size'}"
            )
            (figures.changes_by_depth if kind == "alpha" else figures.moves_by_depth)(axis, self._by_depth())
        return drawing


def compare(a: Any, b: Any, *, directions: int = 10, progress: bool = False, **options: Any) -> Comparison:
    """Measure two models and set them side by side, what moved most first.

    >>> import farms_jax, numpy as np
    >>> before = np.random.default_rng(0).normal(size=(64, 96))
    >>> after = before + 3 * np.outer(np.ones(64), np.ones(96)) / 8
    >>> [row["beyond_error"] for row in farms_jax.compare({"dense": before}, {"dense": after}).layers]
    [False]

    Args:
        a: the model before: path, open `WeightSource`, pytree, `Diagnosis`, or path of a diagnosis in JSON.
        b: the model after, likewise, or the folder of a LoRA adapter of `a`, whose change is then added to `a`.
        directions: leading singular vectors of each layer whose spaces are compared, see `alignment`; 0 for none.
        progress: show progress bars, where the standard error is a terminal.
        **options: options of `diagnose`, the same for both.

    Returns:
        The comparison of the layers that both have under one name.

    Raises:
        InputError: a model cannot be read, or they have no layer in common.
        ValueError: an option is out of its range.
    """
    a, b = (_read(model) for model in (a, b))
    options = _common_settings([model for model in (a, b) if isinstance(model, Diagnosis)], options)
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
        pairs = paired([*rows_a, *before.damaged], [*rows_b, *after.damaged])
        common_a, common_b = ({pair[side] for pair in pairs.values()} for side in (0, 1))
        pairs = {name: (a, b) for name, (a, b) in pairs.items() if a in rows_a and b in rows_b}
        if not pairs:
            raise InputError(
                f"{before.model} and {after.model} have no layer of one name: {next(iter(rows_a))} in the first, "
                f"{next(iter(rows_b))} in the second; give two checkpoints of one model or family, in one format"
            )
        changes = {}
        if weights_a and weights_b:
            changes = dict(_changes(weights_a, weights_b, pairs, directions, progress=progress))
    comparison = Comparison(
        layers=tuple(_row(name, rows_a[a], rows_b[b], changes.get(name, {})) for name, (a, b) in pairs.items()),
        models=(before.model, after.model),
        only_a=tuple(name for name in rows_a if name not in common_a),
        only_b=tuple(name for name in rows_b if name not in common_b),
        damaged={"A": before.damaged, "B": after.damaged},
        settings=before.settings,
        histograms={
            name: (before.histograms[a], after.histograms[b])
            for name, (a, b) in pairs.items()
            if a in before.histograms and b in after.histograms
        },
    )
    return comparison.sort("alpha_change", descending=True, magnitude=True)


def _read(model: Any) -> Any:
    """Return what a model in JSON says, and any other model as it is."""
    return Diagnosis.read_json(model) if isinstance(model, str | Path) and Path(model).suffix == ".json" else model


def _common_settings(known: list[Diagnosis], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under which all is measured: those of the diagnoses that are known, else as they were given.

    Raises:
        InputError: Two diagnoses have other settings, or one has others than those that were given.
    """
    if not known:
        return options
    settings = [Settings.from_json(plain(one.settings)) for one in known]
    if unlike := settings[0].differences(settings[-1]):
        names = " and ".join(one.model for one in known)
        raise InputError(
            f"{names} were measured under different settings ({listed(unlike.values())}); measure one of them again "
            "under those of the other, or give its weights"
        )
    asked = {name: value for name, value in options.items() if hasattr(settings[0], name)}
    if unlike := settings[0].differences(dataclasses.replace(settings[0], **asked)):
        raise InputError(
            f"{known[0].model} was measured under other settings than those asked for ({listed(unlike.values())}); "
            "leave them away, or give its weights"
        )
    return options | vars(settings[0])


def _side(model: Any, opening: contextlib.ExitStack, **options: Any) -> tuple[Diagnosis, WeightSource | None]:
    """Return a model's diagnosis and its weights, open as long as `opening`; of a known diagnosis there are none."""
    if isinstance(model, Diagnosis):
        return model, None
    source = opening.enter_context(opened(model, options.get("axes"), options.get("stack")))
    return diagnose(source, **options), source


def _changes(
    a: WeightSource, b: WeightSource, pairs: Mapping[str, tuple[str, str]], directions: int, *, progress: bool
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield the columns `moved` and those of the alignment, of the layers that have one shape in both."""
    places_a, places_b = (layers_of(source, Settings(tail=Tail(min_count=2)))[0] for source in (a, b))
    # One tensor after the other: a stack may be read as a whole.
    order = {name: number for number, name in enumerate(places_a)}
    names = sorted(pairs, key=lambda name: order[pairs[name][0]])
    for name in tqdm(names, desc="compare", unit="layer", leave=False, disable=None if progress else True):
        places = places_a[pairs[name][0]], places_b[pairs[name][1]]
        first, second = (place.read(source) for place, source in zip(places, (a, b), strict=True))
        if first.shape != second.shape:
            continue
        changes: dict[str, float | None] = {"moved": _distance(first, second)}
        before, after = as_matrices(first, places[0].axes)[0], as_matrices(second, places[1].axes)[0]
        if directions and before.shape == after.shape:
            changes |= alignment(before, after, directions)
        yield name, changes


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return |second - first| / |first| of two weights of one shape, whatever their dtypes and sizes.

    >>> round(_distance(np.full(4, 2e30, np.float32), np.full(4, 4e30, np.float64)), 6)
    1.0
    """
    exact = np.result_type(*(array.dtype if array.dtype.char in "fdFD" else np.float32 for array in (first, second)))
    first, second = (array.astype(exact, copy=False) for array in (first, second))
    if not (largest := max(np.abs(first).max(), np.abs(second).max())):
        return 0.0
    first, second = first / largest, second / largest  # whose squares exist
    size, change = float(np.linalg.norm(first)), float(np.linalg.norm(second - first))
    return change / size if size else 1.0


def _row(layer: str, a: Row, b: Row, changes: Mapping[str, float | None]) -> Row:
    if a["shape"] == b["shape"] and (a["N"], a["M"]) != (b["N"], b["M"]):
        sizes = " and as ".join(f"{side['N']} x {side['M']}" for side in (a, b))
        raise InputError(
            f"{layer}, of shape {a['shape']}, was measured as {sizes}, under different axes; measure one of them again"
        )
    row: dict[str, Any] = {"layer": layer, "place": a.get("place")}
    for name in ("status", "shape"):
        before, after = (text(side, BY_NAME[name]) for side in (a, b))
        row[name] = before if before == after else f"{before} -> {after}"
    row |= changes
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
