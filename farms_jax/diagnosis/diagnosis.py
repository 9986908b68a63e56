"""Diagnosis: what was found in a model, layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from farms_jax.diagnosis.columns import COLUMNS, Column
from farms_jax.diagnosis.layer_table import LayerTable
from farms_jax.diagnosis.summary import closing, summary
from farms_jax.diagnosis.table import plain
from farms_jax.errors import InputError
from farms_jax.programs.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
_FORMAT = "farms_jax diagnosis 2"


class Histogram(NamedTuple):
    """Spectra of one layer on a logarithmic axis, ready to draw and for JSON.

    Attributes:
        edges: log10 of the bins' edges, B + 1 of them, evenly spaced.
        windows: density over log10(eigenvalue) of the pooled windows, B numbers that sum to 1 / bin width.
        whole: the same of the whole matrix; empty where it was not measured.
    """

    edges: tuple[float, ...]
    windows: tuple[float, ...]
    whole: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(LayerTable):
    """Measures of every layer of a model; `layers` is in network order, with the names of `columns.COLUMNS`.

    Attributes:
        model: its name, for people.
        left_out: (name, reason) of every array that is no layer.
        settings: of the diagnosis, of what JSON knows.
        facts: path, format, versions, times: what else a reader may ask, of what JSON knows.
        histograms: spectra by layer.
    """

    possible: ClassVar[tuple[Column, ...]] = COLUMNS

    model: str
    left_out: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    histograms: Mapping[str, Histogram]

    def headline(self) -> str:
        """Return in one line what needs attention."""
        return summary(self.model, self.layers)

    def closing(self) -> list[str]:
        """Return what the statuses mean, the reasons of the worst layers, and what was left out."""
        return closing(self.layers, self.left_out)

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
            return cls(**_fields(json.loads(Path(path).read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: no diagnosis; make one with `farms analyze MODEL --json FILE`") from error

    def write_html(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else: charts, table, spectra, what was left out."""
        from farms_jax.diagnosis.page import page

        write_text(Path(path), page(self))

    def plot(self, kind: Literal["alpha", "spectrum", "bias"] = "alpha", layer: str | None = None) -> Figure:
        """Draw a figure.

        Args:
            kind: `alpha`: of all layers, with intervals, whole matrices and noise; `spectrum`: of one layer, with its
                tail; `bias`: aspect-ratio bias against aspect ratio.
            layer: whose spectrum; by default the one that needs attention most.

        Returns:
            A Matplotlib figure.

        Raises:
            InputError: there is no such kind or layer, or what it needs was not measured, or Matplotlib is not
                installed.
        """
        from farms_jax.diagnosis import figures

        return figures.draw(self, kind, layer)


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Diagnosis` from its JSON; any of several errors where it is something else."""
    if content["format"] != _FORMAT:
        raise ValueError(content["format"])
    spectra = content["histograms"].items()
    return {field.name: content[field.name] for field in dataclasses.fields(Diagnosis)} | {
        "layers": tuple(dict(row) for row in content["layers"]),
        "left_out": tuple((name, reason) for name, reason in content["left_out"]),
        "histograms": {
            layer: Histogram(**{name: tuple(values) for name, values in spectrum.items()})
            for layer, spectrum in spectra
        },
    }
