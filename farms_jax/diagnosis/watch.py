"""watch(): follow the checkpoints of a training run, and raise an alert where a layer goes wrong."""

import dataclasses
import re
import time
from collections.abc import Iterator
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
    """A rule that was broken.

    Attributes:
        checkpoint: path of the checkpoint.
        layer: name of the layer; empty where the whole checkpoint is meant.
        rule: `"ww_alpha"`, `"degenerate"`, `"spikes"` or `"checkpoint"`.
        message: reason in plain words.
    """

    checkpoint: str
    layer: str
    rule: str
    message: str


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
    before: dict[str, Diagnosis] = {}  # the last diagnosis of each series
    while True:
        found = [(path, _version(path)) for path in checkpoints(run)]
        if every is None and not found:
            raise InputError(f"{run}: no checkpoint in it; give the directory that a training writes to")
        for path, version in found:
            if (path, version) in done or version == 0:
                continue
            try:
                diagnosis = diagnose(path, **options)
            except InputError as error:
                if every is not None and (path, version) not in failed:
                    failed.add((path, version))
                elif path.exists():
                    done.add((path, version))
                    yield Seen(path, None, [Alert(str(path), "", "checkpoint", str(error))])
                continue
            done.add((path, version))
            yield Seen(path, diagnosis, _alerts(path, before.get(_series(path)), diagnosis, rules))
            before[_series(path)] = diagnosis
        if every is None:
            return
        time.sleep(every)


def _alerts(checkpoint: Path, before: Diagnosis | None, now: Diagnosis, rules: Rules) -> list[Alert]:
    """Return an alert per layer and rule that is broken now and was not in the checkpoint before."""
    earlier = {row["layer"]: row for row in before.layers} if before else {}
    return [
        Alert(str(checkpoint), row["layer"], rule, message)
        for row in now.layers
        for rule, message in _broken(row, earlier.get(row["layer"]), rules)
    ]


def _broken(row: Row, then: Row | None, rules: Rules) -> Iterator[tuple[str, str]]:
    then = then or {}
    if row["status"] == "degenerate" and then.get("status") != "degenerate":
        yield "degenerate", row["reason"]
    alpha, earlier = row.get("ww_alpha") or 0, then.get("ww_alpha") or 0
    if 1 < alpha < rules.ww_alpha_below and not 1 < earlier < rules.ww_alpha_below:
        was = f", was {earlier:.2f}" if earlier else ""
        yield "ww_alpha", f"ww_alpha {alpha:.2f} is below {rules.ww_alpha_below:g}{was}"
    spikes = row.get("mp_spikes") or 0
    if then.get("mp_spikes") == 0 and spikes >= rules.spikes:
        some = "eigenvalue" if spikes == 1 else "eigenvalues"
        yield "spikes", f"{spikes} {some} beyond the bulk of noise, where there was none"


def _series(path: Path) -> str:
    """Return what the checkpoints of one training share: their path without numbers of steps, with those of seeds."""
    return re.sub(r"(?<!seed)(?<!\d)\d+", "#", str(path))


def _version(path: Path) -> int:
    """Return the time of the last write in nanoseconds, as files are overwritten in place; 0 for a missing file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
