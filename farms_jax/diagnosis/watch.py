"""watch(): follow the checkpoints of a training run, and raise an alert where a layer goes wrong."""

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.layer_table import Row
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
        spikes: so many eigenvalues stand beyond the bulk of noise, where none did in the checkpoint before.
    """

    ww_alpha_below: float = OVER_CORRELATED
    spikes: int = 1


class Alert(NamedTuple):
    """A rule that was broken.

    Attributes:
        checkpoint: path of it.
        layer: which; empty where it is the whole checkpoint.
        rule: `"ww_alpha"`, `"degenerate"`, `"spikes"` or `"checkpoint"`.
        message: in plain words.
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
        run: its directory.
        rules: what raises an alert.
        every: seconds from one look at the directory to the next; `None` looks once.
        **options: of `diagnose`.

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
            yield Seen(path, diagnosis, alerts_of(path, before.get(_series(path)), diagnosis, rules))
            before[_series(path)] = diagnosis
        if every is None:
            return
        time.sleep(every)


def alerts_of(checkpoint: Path, before: Diagnosis | None, now: Diagnosis, rules: Rules) -> list[Alert]:
    """Compare a checkpoint with the one before it.

    Args:
        checkpoint: path of it.
        before: diagnosis of the one before; `None` for the first.
        now: its diagnosis.
        rules: what raises an alert.

    Returns:
        An alert per layer and rule that is broken now and was not before.
    """
    earlier = {row["layer"]: row for row in before.layers} if before else {}
    alerts = []
    for row in now.layers:
        then = earlier.get(row["layer"])
        for rule, message in _broken(row, then, rules):
            alerts.append(Alert(str(checkpoint), row["layer"], rule, message))
    return alerts


def _broken(row: Row, then: Mapping[str, Any] | None, rules: Rules) -> Iterator[tuple[str, str]]:
    def low(measured: Mapping[str, Any] | None) -> bool:
        return measured is not None and 1 < (measured.get("ww_alpha") or 0) < rules.ww_alpha_below

    if row["status"] == "degenerate" and (then is None or then["status"] != "degenerate"):
        yield "degenerate", row["reason"]
    if low(row) and not low(then):
        was = f", was {then['ww_alpha']:.2f}" if then and then.get("ww_alpha") else ""
        yield "ww_alpha", f"ww_alpha {row['ww_alpha']:.2f} is below {rules.ww_alpha_below:g}{was}"
    spikes = row.get("mp_spikes") or 0
    if then is not None and then.get("mp_spikes") == 0 and spikes >= rules.spikes:
        yield (
            "spikes",
            f"{spikes} eigenvalue{'' if spikes == 1 else 's'} beyond the bulk of noise, where there was none",
        )


def _series(path: Path) -> str:
    """What checkpoints of one training have in common: their path without the numbers of steps, but not of seeds."""
    return re.sub(r"(?<!seed)(?<!\d)\d+", "#", str(path))


def _version(path: Path) -> int:
    """When a checkpoint was last written, in nanoseconds: files are overwritten in place; 0 where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
