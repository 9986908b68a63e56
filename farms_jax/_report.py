"""LayerReport: what the analysis found, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax import Array

from farms_jax._names import matching

METRICS = ("alpha", "ks_distance", "xmin", "largest_eigenvalue", "norm", "stable_rank", "alpha_hat", "num_eigenvalues")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*METRICS, "eigenvalues"],
    meta_fields=["names", "num_params", "left_out"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """Spectral measures of the L layers of a network; a pytree whose arrays have shape (L,), float.

    A convolution kernel's numbers are means over its divisions. `print(report)` shows a table.

    Attributes:
        names: of the layers, in natural order (`conv_2` before `conv_10`).
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
            ValueError: a pattern matches no layer of this report.
        """
        dropped = matching(self.names, patterns)
        keep = [i for i, name in enumerate(self.names) if name not in dropped]
        index = np.array(keep, int)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in keep),
            num_params=tuple(self.num_params[i] for i in keep),
            left_out=(*self.left_out, *((name, "excluded") for name in self.names if name in dropped)),
            eigenvalues=None if self.eigenvalues is None else tuple(self.eigenvalues[i] for i in keep),
            **{metric: getattr(self, metric)[index] for metric in METRICS},
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{layer: {measure: number}}`, of Python numbers, ready for JSON."""
        columns = {metric: np.asarray(getattr(self, metric)).tolist() for metric in METRICS}
        columns["num_params"] = list(self.num_params)
        return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(self.names)}

    def __str__(self) -> str:
        """Return the report as a table, and what was left out below it."""
        width = max([len("layer"), *map(len, self.names)])
        lines = [f"{'layer':<{width}} {'alpha':>8} {'KS':>6} {'xmin':>10} {'largest':>10} {'rank':>7} {'count':>8}"]
        for name, row in self.to_dict().items():
            alpha = f"{row['alpha']:8.3f}" if row["alpha"] > 0 else " no tail"
            lines.append(
                f"{name:<{width}} {alpha} {row['ks_distance']:6.3f} {row['xmin']:10.3g} "
                f"{row['largest_eigenvalue']:10.3g} {row['stable_rank']:7.1f} {row['num_eigenvalues']:8d}"
            )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out ({reason}): {', '.join(names[:3])}{more}")
        return "\n".join(lines)
