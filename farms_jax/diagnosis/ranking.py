"""Several models under the same settings, in one table to rank them by."""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

from farms_jax.diagnosis.columns import Column
from farms_jax.diagnosis.pipeline import diagnose
from farms_jax.diagnosis.table import LayerTable
from farms_jax.errors import InputError, one_line


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ranking(LayerTable):
    """One row for each model, with the numbers of `Diagnosis.summary`; `failed` has (model, reason) of the others.

    Attributes:
        damaged: (model, layer, reason) of layers that are not in the numbers: with NaN or Inf, or that cannot be read.
    """

    possible: ClassVar[tuple[Column, ...]] = (
        Column("layer", "the model, as it was given", "", "model"),
        Column("layers", "its layers", "d", "layers"),
        Column("num_params", "parameters in them", ",d", "parameters"),
        Column("alpha", "mean alpha of the layers", ".3f", "alpha"),
        Column("alpha_weighted", "the same, each layer weighted by its parameters", ".3f", "weighted"),
        Column("whole_alpha", "mean alpha of whole matrices", ".3f", "whole"),
        Column("ww_alpha", "mean of WeightWatcher's alpha", ".3f", "ww"),
        Column(
            "ww_alpha_hat", "mean of its weighted alpha, alpha times log10 of the largest eigenvalue", ".3f", "ww_hat"
        ),
        Column("ww_log_alpha_norm", "mean of its log alpha-norm", ".3f"),
        Column("whole_log_norm", "mean of log10 of the squared Frobenius norm", ".3f"),
        Column("well_trained", "share of layers that are well trained", ".0%", "well trained"),
    )

    failed: tuple[tuple[str, str], ...] = ()
    damaged: tuple[tuple[str, str, str], ...] = ()

    def headline(self) -> str:
        """Return how many models were measured, and which has the heaviest tails."""
        known = [row for row in self.layers if row.get("alpha") is not None]
        best = min(known, key=lambda row: row["alpha"], default=None)
        said = f"; the heaviest tails on average has {best['layer']}, alpha {best['alpha']:.3f}" if best else ""
        return f"{len(self)} of {len(self) + len(self.failed)} models measured{said}"

    def closing(self) -> list[str]:
        """Return why models could not be measured, and how far a ranking goes."""
        lines = [f"not measured: {model}: {reason}" for model, reason in self.failed]
        lines += [f"not measured in {model}: {layer}: {reason}" for model, layer, reason in self.damaged]
        return [*lines, "rank models of one architecture and task only: alpha depends on both"]


def rank_models(models: Iterable[str], **options: Any) -> Ranking:
    """Measure models, each under the same settings; one that cannot be read never ends the others.

    Args:
        models: paths of checkpoints.
        **options: options of `diagnose`.

    Returns:
        The table, the smallest mean alpha first.

    Raises:
        InputError: no model can be measured.
    """
    rows, failed, damaged = [], [], []
    for model in models:
        try:
            diagnosis = diagnose(model, **options)
        except (InputError, ValueError) as error:
            reason = one_line(error).removeprefix(f"{model}: ")
            failed.append((model, reason))
            sys.stderr.write(f"{model}: not measured ({reason})\n")
            continue
        damaged += [(model, layer, reason) for layer, reason in diagnosis.damaged.items()]
        found = diagnosis.summary()
        rows.append(found | {"layer": model, "well_trained": found.get("well_trained", 0) / found["layers"]})
    if not rows:
        raise InputError(f"no model could be measured; the first: {failed[0][1]}")
    return Ranking(layers=tuple(rows), failed=tuple(failed), damaged=tuple(damaged)).sort("alpha")
