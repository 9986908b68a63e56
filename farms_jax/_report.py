"""LayerReport: the result of an analysis, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from farms_jax._axes import LeafAxes
from farms_jax._extras import from_extra
from farms_jax._modules import network_order
from farms_jax._names import matching
from farms_jax._present import data_frame, html_table, left_out_lines, text_table
from farms_jax.errors import listed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METRICS = ("alpha", "ks_distance", "xmin", "largest_eigenvalue", "norm", "stable_rank", "alpha_hat", "num_eigenvalues")
_SHOWN = {  # column of the table: what it is, and how its numbers are written
    "alpha": ("exponent of the tail; smaller is heavier", ".3f"),
    "ks_distance": ("Kolmogorov-Smirnov distance of the fit, in [0, 1]", ".3f"),
    "xmin": ("eigenvalue where the tail starts", ".3g"),
    "largest_eigenvalue": ("largest eigenvalue", ".3g"),
    "stable_rank": ("sum of the eigenvalues over the largest", ".1f"),
    "num_eigenvalues": ("eigenvalues of all windows", ""),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*METRICS, "eigenvalues"],
    meta_fields=["names", "num_params", "left_out", "axes", "num_positions"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """Spectral measures of the L layers of a network; a pytree whose arrays have shape (L,), float.

    A convolution kernel's numbers are means over its divisions. `print(report)` shows a table.

    Attributes:
        names: names of the layers, in natural order (`conv_2` before `conv_10`).
        alpha: exponent of the power-law tail, dimensionless, above 1: the smaller, the heavier the tail and the
            better trained the layer. 0 where the spectrum has no tail to fit (see `fit_tail`).
        ks_distance: Kolmogorov-Smirnov distance of the fit, in [0, 1].
        xmin: eigenvalue where the tail starts.
        largest_eigenvalue: square of the largest singular value, over all windows.
        norm: sum of the eigenvalues of all windows.
        stable_rank: norm over largest eigenvalue; 0 for a layer of zeros.
        alpha_hat: alpha times log10 of the largest eigenvalue.
        num_eigenvalues: eigenvalues kept by the filter over all windows, int32.
        num_params: entries of each weight, a complex one counted once.
        left_out: (name, reason) of every leaf that is not in the report.
        axes: (name, axes) of every leaf that holds a layer or is a stack: what its axes count.
        num_positions: kernel positions of each layer, 0 for a matrix that is no convolution's.
        eigenvalues: per layer the pooled eigenvalues (D, E), ascending, of its D divisions; `None` unless asked for.
    """

    names: tuple[str, ...]
    alpha: Array
    ks_distance: Array
    xmin: Array
    largest_eigenvalue: Array
    norm: Array
    stable_rank: Array
    alpha_hat: Array
    num_eigenvalues: Array
    num_params: tuple[int, ...]
    left_out: tuple[tuple[str, str], ...]
    axes: tuple[tuple[str, LeafAxes], ...] = ()
    num_positions: tuple[int, ...] = ()
    eigenvalues: tuple[Array, ...] | None = None

    def __len__(self) -> int:
        """Return L, the number of layers."""
        return len(self.names)

    def drop(self, patterns: str | Iterable[str]) -> LayerReport:
        """Leave out the layers whose names match: the papers' layer selection (LS).

        Args:
            patterns: regular expressions, matched whole.

        Returns:
            A report without those layers; they are listed in `left_out`.

        Raises:
            ValueError: a pattern matches no layer of this report, and none that was left out.
        """
        # A layer that is left out already, as a head of two classes is, may be named too.
        return self.without(matching([*self.names, *(name for name, _ in self.left_out)], patterns))

    def without(self, dropped: Collection[str]) -> LayerReport:
        """Return a report without these layers, which are listed in `left_out`."""
        if not set(self.names) & set(dropped):
            return self
        keep = [i for i, name in enumerate(self.names) if name not in dropped]
        index = np.array(keep, int)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in keep),
            num_params=tuple(self.num_params[i] for i in keep),
            num_positions=tuple(self.num_positions[i] for i in keep) if self.num_positions else (),
            left_out=(*self.left_out, *((name, "excluded") for name in self.names if name in dropped)),
            eigenvalues=None if self.eigenvalues is None else tuple(self.eigenvalues[i] for i in keep),
            **{metric: getattr(self, metric)[index] for metric in METRICS},
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{layer: {measure: number}}` with Python numbers, ready for JSON."""
        columns = {metric: np.asarray(getattr(self, metric)).tolist() for metric in METRICS}
        columns["num_params"] = list(self.num_params)
        return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(self.names)}

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame of the measures, indexed by layer.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.to_dict())

    def plot(self) -> Figure:
        """Draw the alphas of the layers in the order of the network; a layer without a tail is a gap.

        Returns:
            A Matplotlib figure.

        Raises:
            InputError: Matplotlib is not installed.
        """
        with from_extra("diagnose"):  # only here: the core needs no Matplotlib
            from farms_jax._figures import figure, name_layers
        drawing, (axis,) = figure("alpha of the layers", 1, epochs=False)
        alphas = dict(zip(self.names, np.asarray(self.alpha, float), strict=True))
        names = network_order(self.names)
        axis.plot([alphas[name] if alphas[name] > 0 else np.nan for name in names], "o", ms=4)
        axis.set_ylabel("alpha")
        name_layers(axis, names)
        return drawing

    def __str__(self) -> str:
        """Return the report as a table in the order of the network, with the weights that were left out below it."""
        table = text_table(["layer", *_SHOWN], self._cells())
        return "\n".join([table, *self._notes()])

    def __repr__(self) -> str:
        """Return the table; only the number of layers of a traced or stacked report, which has no single numbers."""
        if not self._is_concrete():
            return f"LayerReport({len(self)} layers, alpha {getattr(self.alpha, 'shape', type(self.alpha).__name__)})"
        return str(self)

    def _repr_html_(self) -> str:
        if not self._is_concrete():
            return escape(repr(self))
        heads = {"layer": "full path of the weight"} | {name: meaning for name, (meaning, _) in _SHOWN.items()}
        return html_table(heads, self._cells(), self._notes())

    def _is_concrete(self) -> bool:
        """Tell whether every measure is a concrete array of one number per layer."""
        measures = [getattr(self, metric) for metric in METRICS]
        known = all(isinstance(m, (Array, np.ndarray)) and not isinstance(m, Tracer) for m in measures)
        return known and all(measure.shape == (len(self),) for measure in measures)

    def _notes(self) -> list[str]:
        """Return the lines below the table: what is read as convolutions, what is merged, and what was left out."""
        kernels: dict[int, list[str]] = {}
        for name, positions in zip(self.names, self.num_positions, strict=False):
            if positions:
                kernels.setdefault(positions, []).append(name)
        read = [f"convolutions of {count} positions: {listed(names, 3, ', ')}" for count, names in kernels.items()]
        if merged := [name for name, axes in self.axes if max(len(axes.outputs), len(axes.inputs)) > 1]:
            read.append(f"matrices whose rows or columns are several axes, as heads are: {listed(merged, 3, ', ')}")
        return read + left_out_lines(self.left_out)

    def _cells(self) -> list[list[str]]:
        lines = []
        rows = self.to_dict()
        for name in network_order(self.names):
            row = rows[name]
            numbers = {column: format(row[column], spec) for column, (_, spec) in _SHOWN.items()}
            if not row["alpha"] > 0:
                numbers["alpha"] = "no tail"
            lines.append([name, *numbers.values()])
        return lines
