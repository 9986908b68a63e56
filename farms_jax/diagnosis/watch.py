"""watch(): follow the checkpoints of a training run, and raise an alert where a layer goes wrong."""

import contextlib
import dataclasses
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from farms_jax.diagnosis.columns import Row
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.pipeline import diagnose
from farms_jax.diagnosis.status import OVER_TRAINED
from farms_jax.errors import InputError, MissingPackageError, one_line
from farms_jax.weights import checkpoints

_UNREAD = {".pkl", ".pickle", ".joblib", ".h5", ".hdf5", ".keras", ".onnx", ".index"}  # .index: of TensorFlow


@dataclasses.dataclass(frozen=True)
class Rules:
    """What raises an alert, at the first checkpoint of which it is true.

    Besides these: a layer that becomes degenerate, one that has NaN or Inf or cannot be read, and a checkpoint of which
    nothing can be measured.

    Attributes:
        ww_alpha_below: WeightWatcher's alpha of the whole matrix is below this.
        spikes: this many eigenvalues stand beyond the bulk of noise, where none did in the checkpoint before.
        scale: the layer's Frobenius norm is so many times larger, or smaller, than in the checkpoint before.
    """

    ww_alpha_below: float = OVER_TRAINED
    spikes: int = 1
    scale: float = 100.0


class Alert(NamedTuple):
    """A rule that was broken."""

    checkpoint: str  # its path
    layer: str  # its name; empty where the whole checkpoint is meant
    rule: str  # "ww_alpha", "degenerate", "spikes", "scale", "damaged" or "checkpoint"
    message: str  # the reason in plain words


class Seen(NamedTuple):
    """A checkpoint that was looked at; without a diagnosis where it could not be measured."""

    checkpoint: Path
    diagnosis: Diagnosis | None
    alerts: list[Alert]


def watch(
    run: Path,
    *,
    rules: Rules = Rules(),  # noqa: B008
    every: float | None = None,
    earlier: Iterable[tuple[Path, Diagnosis]] = (),
    **options: Any,
) -> Iterator[Seen]:
    """Measure the checkpoints of a run, oldest first, and go on with new ones.

    Nothing that is found in the directory ends it. A checkpoint that cannot be measured is tried once more later, as it
    may be half written, and is an alert then; one that is gone is forgotten.

    Args:
        run: directory of the run.
        rules: rules that raise an alert.
        every: seconds from one look at the directory to the next; `None` looks once.
        earlier: checkpoints that are gone, with their diagnoses, oldest first: what was wrong with them is no news.
        **options: options of `diagnose`.

    Yields:
        What was found in each checkpoint.

    Raises:
        InputError: `run` is no directory, or, when looking once, has no checkpoint.
    """
    done: set[Any] = set()
    failed: set[Any] = set()
    missing: set[str] = set()  # packages, as far as they were told
    # The last diagnosis of each series of checkpoints.
    before = {_series(path): diagnosis for path, diagnosis in earlier}
    found = checkpoints(run)
    if not found and every is None:
        raise InputError(f"{run}: no checkpoint in it{_unread(run)}; give the directory that a training writes to")
    while True:
        if not found and not done:
            text = f"{run}: no checkpoint in it yet{_unread(run)}; it is looked at every {every:g} seconds"
            warnings.warn(text, stacklevel=2)
        for path in found:
            version = _version(path)
            if version is None or version in done:
                continue
            result = _diagnosed(path, options)
            if isinstance(result, Diagnosis):
                alerts = list(_alerts(path, before.get(_series(path)), result, rules))
                before[_series(path)] = result
                done.add(version)
                yield Seen(path, result, alerts)
            elif every is not None and version not in failed and not isinstance(result, MissingPackageError):
                failed.add(version)
            elif os.path.exists(path):
                done.add(version)
                yield Seen(path, None, [Alert(str(path), "", "checkpoint", _reason(path, result, missing))])
        if every is None:
            return
        time.sleep(every)
        found = _found_again(run)


def _found_again(run: Path) -> list[Path]:
    """Return the checkpoints of a run that was there before; without it there are none for now."""
    try:
        return checkpoints(run)
    except (InputError, OSError) as error:
        warnings.warn(f"{one_line(error)}; it is looked at again", stacklevel=2)
        return []


def _unread(run: Path) -> str:
    """Return a remark on a file that looks like a checkpoint and is of a kind that is not read, if there is one."""
    with contextlib.suppress(OSError):  # a run that goes on removes files
        for path in sorted(run.rglob("*")):
            if path.suffix in _UNREAD:
                return f", and {path} is of a kind that is not read: save safetensors, npz or Torch's"
    return ""


def _version(path: Path) -> Any:
    """Return what changes with the files of a checkpoint, which may be overwritten in place; `None` once it is gone."""
    try:
        files = [path, *(path.iterdir() if path.is_dir() else ())]
        return path, tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files))
    except OSError:
        return None


def _diagnosed(path: Path, options: Mapping[str, Any]) -> Diagnosis | Exception:
    try:
        return diagnose(path, **options)
    except Exception as error:  # of any kind: the next checkpoint may be a good one
        return error


def _reason(path: Path, error: Exception, missing: set[str]) -> str:
    """Return why a checkpoint cannot be measured; how to get a package only once."""
    if isinstance(error, MissingPackageError):
        package = error.what.rpartition(": ")[2]
        reason = error.what if package in missing else str(error)
        missing.add(package)
        return reason
    if isinstance(error, InputError):
        return str(error)
    return f"{path}: cannot be measured ({type(error).__name__}: {one_line(error)})"


def _series(path: Path) -> str:
    """Return what the checkpoints of one training share: their path without numbers of steps, with those of seeds."""
    return re.sub(r"(?<!seed)(?<!\d)\d+", "#", str(path))


def _alerts(checkpoint: Path, before: Diagnosis | None, now: Diagnosis, rules: Rules) -> Iterator[Alert]:
    """Yield an alert per layer and rule that is broken now and was not in the checkpoint before."""
    for name, reason in now.damaged.items():
        if before is None or name not in before.damaged:
            yield Alert(str(checkpoint), name, "damaged", reason)
    known = {row["layer"]: row for row in before.layers} if before else {}
    for row in now.layers:
        name, then = row["layer"], known.get(row["layer"], {})
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
        grown = _log_norm(row) - _log_norm(then)  # NaN where one of them is not known
        if abs(grown) >= math.log10(rules.scale):
            change = "larger" if grown > 0 else "smaller"
            message = f"its norm is {10 ** min(abs(grown), 300):.3g} times {change} than in the checkpoint before"
            yield Alert(str(checkpoint), name, "scale", message)


def _log_norm(row: Row) -> float:
    """Return log10 of the Frobenius norm of a layer; NaN where it was not measured, or is no number."""
    log = row.get("whole_log_norm")
    return math.nan if log is None or not math.isfinite(log) else log / 2
