"""watch(): follow the checkpoints of a training run, and raise an alert where a layer goes wrong."""

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from farms_jax.diagnosis.columns import Row
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.pipeline import diagnose
from farms_jax.diagnosis.status import OVER_CORRELATED
from farms_jax.errors import InputError
from farms_jax.weights import checkpoints


@dataclasses.dataclass(frozen=True)
class Rules:
    """What raises an alert, at the first checkpoint of which it is true.

    Besides these: a layer that becomes degenerate, and a checkpoint that cannot be measured, NaN in it above all.

    Attributes:
        ww_alpha_below: WeightWatcher's alpha of the whole matrix is below this.
        spikes: this many eigenvalues stand beyond the bulk of noise, where none did in the checkpoint before.
    """

    ww_alpha_below: float = OVER_CORRELATED
    spikes: int = 1


class Alert(NamedTuple):
    """A rule that was broken."""

    checkpoint: str  # its path
    layer: str  # its name; empty where the whole checkpoint is meant
    rule: str  # "ww_alpha", "degenerate", "spikes" or "checkpoint"
    message: str  # the reason in plain words


class Seen(NamedTuple):
    """A checkpoint that was looked at; without a diagnosis where it could not be measured."""

    checkpoint: Path
    diagnosis: Diagnosis | None
    alerts: list[Alert]


def watch(run: Path, *, rules: Rules = Rules(), every: float | None = None, **options: Any) -> Iterator[Seen]:  # noqa: B008
    """Measure the checkpoints of a run, oldest first, and go on with new ones.

    A checkpoint that cannot be read is tried once more later: it may be half written. One that is gone is forgotten.

    Args:
        run: directory of the run.
        rules: rules that raise an alert.
        every: seconds from one look at the directory to the next; `None` looks once.
        **options: options of `diagnose`.

    Yields:
        What was found in each checkpoint.

    Raises:
        InputError: `run` is no directory, or, when looking once, has no checkpoint.
    """
    done: set[tuple[Path, int]] = set()
    failed: set[tuple[Path, int]] = set()
    before: dict[str, dict[str, Row]] = {}  # the last layers of each series of checkpoints, by name
    while True:
        found = checkpoints(run)
        if every is None and not found:
            raise InputError(f"{run}: no checkpoint in it; give the directory that a training writes to")
        for path in found:
            try:
                version = path, path.stat().st_mtime_ns  # files are overwritten in place
            except OSError:  # it is gone
                continue
            if version in done:
                continue
            try:
                diagnosis = diagnose(path, **options)
            except InputError as error:
                if every is not None and version not in failed:
                    failed.add(version)
                elif path.exists():
                    done.add(version)
                    yield Seen(path, None, [Alert(str(path), "", "checkpoint", str(error))])
                continue
            done.add(version)
            # What the checkpoints of one training share: their path without numbers of steps, with those of seeds.
            series = re.sub(r"(?<!seed)(?<!\d)\d+", "#", str(path))
            alerts = _alerts(path, before.get(series, {}), diagnosis.layers, rules)
            yield Seen(path, diagnosis, list(alerts))
            before[series] = {row["layer"]: row for row in diagnosis.layers}
        if every is None:
            return
        time.sleep(every)


def _alerts(checkpoint: Path, before: Mapping[str, Row], now: Sequence[Row], rules: Rules) -> Iterator[Alert]:
    """Yield an alert per layer and rule that is broken now and was not in the checkpoint before."""
    for row in now:
        name, then = row["layer"], before.get(row["layer"], {})
        if row["status"] == "degenerate" and then.get("status") != "degenerate":
            yield Alert(str(checkpoint), name, "degenerate", row["reason"])
        alpha, earlier = row.get("ww_alpha") or 0, then.get("ww_alpha") or 0
        if 1 < alpha < rules.ww_alpha_below and not 1 < earlier < rules.ww_alpha_below:
            was = f", was {earlier:.2f}" if earlier else ""
            message = f"ww_alpha {alpha:.2f} is below {rules.ww_alpha_below:g}{was}"
            yield Alert(str(checkpoint), name, "ww_alpha", message)
        spikes = row.get("mp_spikes") or 0
        if then.get("mp_spikes") == 0 and spikes >= rules.spikes:
            some = "eigenvalue" if spikes == 1 else "eigenvalues"
            message = f"{spikes} {some} beyond the bulk of noise, where there was none"
            yield Alert(str(checkpoint), name, "spikes", message)
