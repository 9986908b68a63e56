"""The run directory: what a training writes, and how it is picked up again.

    RUN/.lock                               held by the one process that works here
    RUN/config.json                         settings, data set and its fingerprint, versions
    RUN/seed43/metrics.jsonl                one line per epoch
    RUN/seed43/layers.csv                   epoch, layer, alpha, lr_scale, learning_rate
    RUN/seed43/checkpoints/last/390         after so many steps; the last two are kept
    RUN/seed43/checkpoints/best/390         of the epoch that the program calls its best

A checkpoint is written after every epoch, and at the step where a run is stopped or its loss is not finite. It appears
whole or not at all, and holds

    default/                                the arrays, by Orbax
    partial_epoch.json                             sums of an unfinished epoch, where it is in the middle of one
    metrics.jsonl, layers.csv               the lines up to there
    SHA256SUMS                              checksums of all these

A run goes on from the newest checkpoint whose checksums are right, with the lines that are in it: none is lost, none is
there twice, and none is damaged.
"""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import platform
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Generator, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from farms_jax._names import named_leaves
from farms_jax._report import LayerReport
from farms_jax.errors import InputError
from farms_jax.programs.files import atomic, damaged_files, write_checksums, write_json
from farms_jax.programs.locking import locked
from farms_jax.programs.stopping import Stopped

LAYER_FIELDS = ("epoch", "layer", "alpha", "lr_scale", "learning_rate")
_LINES = ("metrics.jsonl", "layers.csv")
_ARRAYS, _SO_FAR = "default", "partial_epoch.json"  # in a checkpoint
_ROOM = 2**20  # bytes of a checkpoint beside its arrays, at most
_KEPT_LAST, _KEPT_BEST = 2, 1  # the last but one is there for when the last is damaged
# What reading JSON or CSV of another shape comes to.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, csv.Error)

T = TypeVar("T")


class RunError(InputError):
    """A run directory cannot be used; the message says why, and what to do."""


class StoppedRun(Stopped):
    """A run was stopped by a signal; the message says how to go on."""

    def __init__(self, number: int, run: Path) -> None:
        """Keep the signal's number and the run's directory."""
        super().__init__(number)
        self.run = run

    def __str__(self) -> str:
        """Return the signal's name and what goes on with the run."""
        return f"{super().__str__()}; go on with --resume {shlex.quote(str(self.run))}"


@contextlib.contextmanager
def at_work(run: Path) -> Generator[None]:
    """Keep a run directory for this process, and say how to go on where the work inside is stopped.

    Args:
        run: its directory, made where there is none.

    Yields:
        Nothing.

    Raises:
        InputError: another process is at work there.
        StoppedRun: the work was stopped by Ctrl-C or SIGTERM.
    """
    with locked(run):
        try:
            yield
        except Stopped as stopped:
            raise StoppedRun(stopped.signal, run) from stopped


def write_config(run: Path, config: Any, facts: Mapping[str, Any]) -> None:
    """Write `config.json`.

    Args:
        run: a run directory, made where there is none.
        config: the settings, a dataclass of what JSON knows, paths and tuples.
        facts: about data and versions, of what JSON knows.
    """
    write_json(run / "config.json", {"config": dataclasses.asdict(config), **facts})


def environment() -> dict[str, Any]:
    """Versions and devices that a run's numbers depend on, ready for JSON."""
    return {
        "versions": {name: version(name) for name in ("farms-jax", "jax", "jaxlib", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def layer_rows(report: LayerReport, scale: Any, rate: float, epoch: int) -> list[dict[str, Any]]:
    """Rows of `layers.csv` for one epoch.

    Args:
        report: of `farms_jax.analyze`.
        scale: of `farms_jax.lr_scale`, for the same parameters.
        rate: global learning rate.
        epoch: its number.

    Returns:
        One row per layer of the report.
    """
    factors = dict(named_leaves(scale))
    return [
        {
            "epoch": epoch,
            "layer": name,
            "alpha": float(alpha),
            "lr_scale": float(factors[name]),
            "learning_rate": rate * float(factors[name]),
        }
        for name, alpha in zip(report.names, np.asarray(report.alpha), strict=True)
    ]


def read_config(run: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Read `config.json` back.

    Args:
        run: a run directory.
        kind: dataclass of the settings; its annotations say what is a path or a tuple.

    Returns:
        The settings, and everything else in the file.

    Raises:
        RunError: there is no such file, or it is damaged or of another version: it has not the fields of `kind`.
    """
    path = run / "config.json"
    if not path.is_file():
        raise RunError(f"--resume {run}: there is no {path.name} in it; give the directory that a run printed")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return _restored(facts.pop("config"), kind), facts
    except _DAMAGED as error:
        why = _reason(error)
        raise RunError(f"--resume {run}: {path} is damaged or of another version ({why}); start anew") from error


def _reason(error: Exception) -> str:
    """What an error says, on one line of letters that a terminal can show."""
    text = " ".join(str(error).split())[:300]
    return text if text.isprintable() else ascii(text)


def _restored(value: Any, kind: Any) -> Any:
    """What was written as JSON, as its annotation has it: dataclasses, tuples and paths, in each other too."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name for field in dataclasses.fields(kind) if field.init}
        if different := sorted(fields ^ set(value)):
            raise TypeError(f"fields {', '.join(different)}")
        return typing.cast(Any, kind)(**{name: _restored(value[name], hints[name]) for name in fields})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        if value is None and types.NoneType in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        return _restored(value, kinds[0]) if len(kinds) == 1 else value
    if origin is tuple:
        parts = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_restored(part, part_kind) for part, part_kind in zip(value, parts, strict=True))
    return Path(value) if kind is Path else value


class Progress(NamedTuple):
    """Where a training stands.

    Attributes:
        state: a pytree of arrays.
        done: finished steps in all.
        so_far: numbers of the unfinished epoch, by name; empty between epochs.
    """

    state: Any
    done: int
    so_far: dict[str, float]


class SeedDirectory:
    """Files of one seed's training; closed at the end of a `with` block."""

    def __init__(self, path: Path) -> None:
        """Open the directory, made where there is none.

        Args:
            path: of the seed.
        """
        self.path = path
        self._last, self._best = path / "checkpoints" / "last", path / "checkpoints" / "best"
        for folder in (self._last, self._best):
            folder.mkdir(parents=True, exist_ok=True)
        # Without threads of its own: a step's arrays are donated to the next one.
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def __enter__(self) -> Self:
        """Return the directory itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def restore(self, like: Any) -> Progress:
        """Read the last checkpoint that is whole, and put the lines of that moment back.

        Newer ones that are damaged are named on stderr and removed.

        Args:
            like: a state of the same shapes, returned where there is no checkpoint.

        Returns:
            Where the training stands.

        Raises:
            RunError: all checkpoints are damaged, or one is not of these settings.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(_steps(self._last)):
            if files := damaged_files(folder, exact=True):
                damaged[folder] = ", ".join(str(file.relative_to(folder)) for file in files)
                continue
            progress = self._read(folder, like)
            for other, names in damaged.items():
                sys.stderr.write(f"{other}: damaged ({names}); going on from {folder.name}, the checkpoint before it\n")
                _remove(other)
            self._put_lines_back(folder)
            return progress
        if damaged:
            found = "; ".join(f"{folder} ({names})" for folder, names in damaged.items())
            raise RunError(f"--resume: no checkpoint is whole: {found}; put these files back, or start anew")
        self._put_lines_back(None)
        return Progress(like, 0, {})

    def save(self, state: Any, done: int, so_far: Mapping[str, float] | None = None) -> Path:
        """Write a checkpoint to go on from, with the lines there are; it appears whole or not at all.

        Args:
            state: any pytree of arrays.
            done: finished steps in all.
            so_far: numbers of the unfinished epoch, where it is in the middle of one.

        Returns:
            Its folder.

        Raises:
            RunError: it cannot be written; the checkpoints before it are as they were.
        """
        return self._write(self._last, done, state, so_far or {}, _KEPT_LAST)

    def save_best(self, state: Any, done: int) -> Path:
        """Write the best checkpoint; it appears whole or not at all.

        Args:
            state: any pytree of arrays.
            done: finished steps in all.

        Returns:
            Its folder.

        Raises:
            RunError: it cannot be written; the one before it is as it was.
        """
        return self._write(self._best, done, state, {}, _KEPT_BEST)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`.

        Args:
            metrics: `epoch`, counted from 0, and whatever else was measured.
        """
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def append_layers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to `layers.csv`.

        Args:
            rows: `LAYER_FIELDS` of every layer.
        """
        path = self.path / "layers.csv"
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, LAYER_FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl`.

        Returns:
            Its lines.

        Raises:
            RunError: a line is damaged.
        """
        try:
            return [json.loads(line) for line in self._lines("metrics.jsonl")]
        except _DAMAGED as error:
            raise self._damaged("metrics.jsonl", error) from error

    def layers(self) -> list[dict[str, Any]]:
        """Read `layers.csv`.

        Returns:
            Its lines, numbers as float (`epoch` as int).

        Raises:
            RunError: a line is damaged.
        """
        numbers = LAYER_FIELDS[2:]
        try:
            return [
                {**row, "epoch": int(row["epoch"]), **{field: float(row[field]) for field in numbers}}
                for row in csv.DictReader(self._lines("layers.csv"))
            ]
        except _DAMAGED as error:
            raise self._damaged("layers.csv", error) from error

    def close(self) -> None:
        """Release what Orbax holds."""
        self._checkpointer.close()

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []

    def _damaged(self, name: str, error: Exception) -> RunError:
        why = _reason(error)
        return RunError(f"{self.path / name} is damaged ({why}); --resume puts it back as the last checkpoint has it")

    def _read(self, folder: Path, like: Any) -> Progress:
        abstract = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        try:
            found = self._checkpointer.restore(folder.resolve(), args=ocp.args.Composite(**{_ARRAYS: abstract}))
        except Exception as error:  # of any kind: it depends on what differs
            why = " ".join(str(error).split())[:300]
            raise RunError(f"--resume: the checkpoint {folder} is not of these settings ({why}); start anew") from error
        so_far = folder / _SO_FAR
        numbers = json.loads(so_far.read_text(encoding="utf-8")) if so_far.is_file() else {}
        return Progress(found[_ARRAYS], int(folder.name), numbers)

    def _put_lines_back(self, folder: Path | None) -> None:
        for name in _LINES:
            if folder is not None and (folder / name).is_file():
                with atomic(self.path / name) as part:
                    shutil.copyfile(folder / name, part)
            else:
                (self.path / name).unlink(missing_ok=True)

    def _write(self, folder: Path, done: int, state: Any, so_far: Mapping[str, float], keep: int) -> Path:
        part, whole = folder / f"{done}.part", folder / str(done)
        _remove_drafts(folder)  # left by a process that was killed
        try:
            _check_room(folder, state)
            self._fill(part, state, so_far)
        except Exception as error:  # of any kind: Orbax reports a full disk as a ValueError
            _remove_drafts(folder)  # makes room
            why = " ".join(str(error).split())[-300:]
            raise RunError(f"{whole}: cannot be written (... {why}); make room, then --resume goes on") from error
        if whole.exists():
            _remove(whole)
        part.rename(whole)
        for old in _steps(folder)[:-keep]:
            _remove(old)
        return whole

    def _fill(self, folder: Path, state: Any, so_far: Mapping[str, float]) -> None:
        arrays = ocp.args.StandardSave(state)
        self._checkpointer.save(folder.resolve(), args=ocp.args.Composite(**{_ARRAYS: arrays}))
        if so_far:
            write_json(folder / _SO_FAR, {name: float(value) for name, value in so_far.items()})
        for name in _LINES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)
        write_checksums(folder)


def _check_room(folder: Path, state: Any) -> None:
    """Find out before Orbax does, whose threads would print a traceback each, that a disk is full."""
    need, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _ROOM, shutil.disk_usage(folder).free
    if need > free:
        sizes = f"{need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}")


def _steps(folder: Path) -> list[Path]:
    return sorted((child for child in folder.iterdir() if child.name.isdecimal()), key=lambda child: int(child.name))


def _remove_drafts(folder: Path) -> None:
    for child in folder.glob("*.part*"):
        shutil.rmtree(child)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; half removed it has the name of one that is not there."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.part")))
