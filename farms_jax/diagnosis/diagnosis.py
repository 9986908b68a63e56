"""Diagnosis: the measures of a model's layers, and how they are shown, drawn and written."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from farms_jax._extras import from_extra
from farms_jax._present import counted, left_out_lines, short_count
from farms_jax.diagnosis.columns import BY_NAME, COLUMNS, Column, number, plain, with_interval
from farms_jax.diagnosis.exports import rates, recipe
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.status import MEANINGS, attention, counts, disagreement_summary
from farms_jax.diagnosis.steps import LIKE_NOISE, Step, mostly_noise, steps
from farms_jax.diagnosis.summary import HEADS, LEFT, by_type, of_model, telling_types
from farms_jax.diagnosis.table import SHORT, LayerTable, Layout, Part, show_parts
from farms_jax.errors import InputError
from farms_jax.programs.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "farms_jax diagnosis 2"
_SPARSE = 0.05  # share of zeros from which on it is told
_EXPLAINED = 5  # layers whose reason is given below the table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(LayerTable):
    """Measures of every layer of a model; `layers` is in network order, with the names of `columns.COLUMNS`.

    Attributes:
        model: name of the model.
        left_out: (name, reason) of every array that is not a layer.
        settings: settings of the diagnosis, in types of JSON.
        facts: provenance, in types of JSON: path, format, hash of the weights, date, versions.
        histograms: spectra by layer.
    """

    possible: ClassVar[tuple[Column, ...]] = COLUMNS

    model: str
    left_out: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    histograms: Mapping[str, Histogram]

    @property
    def damaged(self) -> Mapping[str, str]:
        """Layer -> why it could not be measured: it has NaN or Inf, or cannot be read."""
        return self.facts.get("damaged") or {}

    def headline(self) -> str:
        """Return in one line how many layers there are of each status, and which to look at first."""
        line = ", ".join([self._measured(), *(f"{count} {status}" for status, count in counts(self.layers).items())])
        if self.damaged:
            name, reason = next(iter(self.damaged.items()))
            return f"{line}, {len(self.damaged)} not measured; look first at {name} ({reason})"
        noise = mostly_noise(self.layers)
        for row in attention(self.layers)[:1]:
            if noise and row["status"] in LIKE_NOISE:
                return f"{line}; {'all' if noise == len(self) else 'most'} of them are as noise, or nearly"
            alpha = f", alpha {with_interval(row, BY_NAME['alpha'])}" if number(row, "alpha") else ""
            line += f"; look first at {row['layer']} ({row['status']}{alpha})"
        return line

    def _measured(self) -> str:
        """Return in words what of the model was measured."""
        quantised = f", {self.facts['quantisation']}" if self.facts.get("quantisation") else ""
        return f"{self.model}{quantised}: {counted(len(self), 'layer')}{self._share()}{self._zeros()}"

    def _zeros(self) -> str:
        """Return in words how many of the layers' weights are zero; empty where few are."""
        sizes = [(number(row, "zeros") or 0.0, number(row, "num_params") or 0) for row in self.layers]
        share = sum(zeros * size for zeros, size in sizes) / (sum(size for _, size in sizes) or 1)
        return f", {share:.0%} of their weights zero" if share >= _SPARSE else ""

    def _share(self) -> str:
        """Return in words how many of the model's parameters its layers have; empty where that was not counted."""
        total = self.facts.get("num_params")
        if not total:
            return ""
        share = sum(number(row, "num_params") or 0 for row in self.layers) / total
        # Neither all nor nothing is said of what is not quite that.
        percent = min(99.9, round(100 * share, 1 if share < 0.1 or share > 0.99 else 0)) if share < 1 else 100
        return f" with {percent:g} % of {short_count(total)} parameters"

    def closing(self) -> list[str]:
        """Return what was left out, what the statuses mean, and the reasons of the layers that need a look most."""
        meanings = [f"{status}: {MEANINGS[status]}" for status in counts(self.layers) if status in MEANINGS]
        worst = attention(self.layers)[:_EXPLAINED]
        reasons = [f"{row['layer']}: {row['reason']}" for row in worst if row.get("reason")]
        return [*left_out_lines(self.left_out), *meanings, *reasons, *disagreement_summary(self.layers)]

    def summary(self) -> dict[str, Any]:
        """Return the model in numbers, to rank models by: means of alphas over its layers, layers of each status."""
        return of_model(self.layers)

    def types(self) -> dict[str, dict[str, Any]]:
        """Return `{type: summary}` of the layers of each type of module, in network order."""
        return {group.name: of_model(group.rows) for group in by_type(self._by_depth())}

    def steps(self) -> list[Step]:
        """Return what to do now: what stands out, what that usually means, what to try, and the commands for it."""
        return steps(self._by_depth(), self.facts)

    def show(self, *, table: bool | None = None) -> None:
        """Print what was found, the most important last: coloured, as wide as the terminal, plain into a file.

        Args:
            table: print the table of all layers; by default where it is short.
        """
        show_parts(functools.partial(self.parts, table=table))

    def parts(self, width: int | None, table: bool | None = None) -> list[Part]:
        """Return what was measured, the table of layers if it is asked for or short, notes, types, steps, headline."""
        layout, types = self._layout(width), telling_types(self._by_depth())
        parts = [Part("text", [self._measured()])]
        if len(self) <= SHORT if table is None else table:
            parts += [Part("table", table=layout), Part("text", layout.notes)]
        else:
            hint = f"table of the {len(self)} layers: show(table=True) in Python, --table, --html, --csv"
            parts.append(Part("text", [hint]))
        parts.append(Part("text", self.closing()))
        if types:
            cells = [group.cells() for group in types]
            parts.append(Part("table", table=Layout(HEADS, LEFT, cells)))
        for i, step in enumerate(self.steps(), start=1):
            parts.append(Part("step", [f"{i}. {step.found}", f"   usually: {step.means}", f"   try: {step.attempt}"]))
            parts.append(Part("code", [f"     {line}" for line in step.code]))
        return [*parts, Part("title", [self.headline()])]

    def write_rates(self, path: str | Path, *, low: float = 0.5, high: float = 1.5) -> None:
        """Write factors of the learning rate by layer (TempBalance) as JSON, for Torch or `diagnosis.read_rates`.

        Args:
            path: file to write.
            low: factor of the smallest alpha.
            high: factor of the largest alpha.
        """
        write_json(Path(path), rates(self._by_depth(), self.left_out, low=low, high=high))

    def write_recipe(self, path: str | Path, *, sparsity: float, each: Literal["block", "layer"] = "block") -> None:
        """Write a recipe of llm-compressor that removes more where alpha is large.

        Args:
            path: file to write, `.yaml`.
            sparsity: fraction of the blocks' weights to remove, in (0, 1).
            each: what has a sparsity of its own: a `block`, by its mean alpha, or a `layer`.

        Raises:
            InputError: there are no numbered blocks under Torch's names, or the sparsity is out of its range.
        """
        write_text(Path(path), recipe(self._by_depth(), sparsity=sparsity, each=each))

    def write_json(self, path: str | Path) -> None:
        """Write everything, for `read_json`."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["histograms"] = {name: histogram._asdict() for name, histogram in self.histograms.items()}
        write_json(Path(path), plain({"format": _FORMAT} | content))

    @classmethod
    def read_json(cls, path: str | Path) -> Diagnosis:
        """Return what `write_json` wrote.

        Raises:
            InputError: the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise InputError(f"format {content['format']!r}")
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            fields["layers"] = tuple(map(dict, fields["layers"]))
            fields["left_out"] = tuple((name, reason) for name, reason in fields["left_out"])
            fields["histograms"] = {
                layer: Histogram.from_json(spectra) for layer, spectra in fields["histograms"].items()
            }
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: no diagnosis; make one with `farms analyze MODEL --json FILE`") from error

    def write_html(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else: charts, table, spectra, what was left out, how it was measured.

        Layers are in network order.

        Raises:
            InputError: Matplotlib is not installed.
        """
        with from_extra("diagnose"):
            from farms_jax.diagnosis.page import page
        content = page(
            self._by_depth(),
            self.columns,
            self.histograms,
            model=self.model,
            headline=self.headline(),
            steps=self.steps(),
            facts={**self.facts, "settings": self.settings},
            left_out=self.left_out,
        )
        write_text(Path(path), content)

    def plot(self, kind: Literal["alpha", "spectrum", "bias"] = "alpha", layer: str | None = None) -> Figure:
        """Draw a figure.

        Args:
            kind: `alpha`: alphas of all layers with intervals, of whole matrices and of noise; `spectrum`: one layer's
                spectrum with its tail; `bias`: aspect-ratio bias against aspect ratio.
            layer: name of the layer whose spectrum is drawn; by default the one that needs attention most.

        Returns:
            A Matplotlib figure.

        Raises:
            InputError: there is no such kind or layer, or what it needs was not measured, or Matplotlib is not
                installed.
        """
        self._check_plot(kind, ("alpha", "spectrum", "bias"), layer)
        if kind == "bias" and not any(number(row, "aspect_ratio_bias") is not None for row in self.layers):
            raise InputError("plot: the bias needs whole matrices; measure with whole=True")
        with from_extra("diagnose"):
            from farms_jax.diagnosis import figures
        if kind == "alpha":
            drawing, axis = figures.axes(f"{self.model}: alpha of the layers")
            figures.alphas_by_depth(axis, self._by_depth())
        elif kind == "bias":
            drawing, axis = figures.axes(f"{self.model}: what the whole matrix adds to alpha", figures.NARROW)
            figures.bias_by_aspect_ratio(axis, self.layers)
        else:
            rows = {row["layer"]: row for row in [*attention(self.layers), *self.layers]}
            name = next(iter(rows), "") if layer is None else layer
            if name not in rows:
                raise InputError(f"plot: there is no layer {name!r}; `names` has all layers")
            if name not in self.histograms:
                raise InputError(f"plot: {name} has no spectrum in this diagnosis")
            row = rows[name]
            drawing, axis = figures.axes(f"{name}: {row.get('status') or 'spectrum'}", figures.NARROW)
            figures.spectrum(axis, row, self.histograms[name])
            axis.legend(fontsize="small")
        return drawing
