"""The run directory: what a training writes, and how it is picked up again.

    RUN/config.json                 settings, data set and its fingerprint, versions
    RUN/seed43/metrics.jsonl        one line per epoch
    RUN/seed43/layers.csv           epoch, layer, alpha, lr_scale, learning_rate
    RUN/seed43/checkpoints/last     Orbax, after every epoch
    RUN/seed43/checkpoints/best     Orbax, of the epoch that the program calls its best

An epoch's lines are written before its checkpoint; a resumed run drops the lines of epochs that its checkpoint
does not have, so no line is lost and none is there twice.
"""

import csv
import dataclasses
import json
import platform
import types
import typing
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from farms_jax._names import named_leaves
from farms_jax._report import LayerReport
from farms_jax.errors import InputError
from farms_jax.files import write_json, write_text

LAYER_FIELDS = ("epoch", "layer", "alpha", "lr_scale", "learning_rate")
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what reading JSON of another shape comes to

T = TypeVar("T")


class RunError(InputError):
    """A run directory cannot be used; the message says why, and what to do."""


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
        raise RunError(f"--resume {run}: {path} is damaged or of another version ({error}); start anew") from error


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


class SeedDirectory:
    """Files of one seed's training; closed at the end of a `with` block."""

    def __init__(self, path: Path) -> None:
        """Open the directory, made where there is none.

        Args:
            path: of the seed.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._last = _manager(path / "checkpoints" / "last")
        self._best = _manager(path / "checkpoints" / "best")

    def __enter__(self) -> Self:
        """Return the directory itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def restore(self, like: Any) -> tuple[Any, int]:
        """Read the last checkpoint, and drop the lines of epochs that it does not have.

        Args:
            like: a state of the same shapes, returned where there is no checkpoint.

        Returns:
            The state and the number of finished epochs.

        Raises:
            RunError: the checkpoint does not fit the settings, or is damaged.
        """
        done = self._last.latest_step() or 0
        self._keep_lines_before(done)
        if not done:
            return like, 0
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._last.restore(done, args=ocp.args.StandardRestore(abstract)), done
        except Exception as error:
            where = self.path / "checkpoints" / "last" / str(done)
            raise RunError(f"--resume: the checkpoint {where} does not fit or is damaged ({error})") from error

    def save(self, state: Any, done: int) -> None:
        """Write the last checkpoint, atomically.

        Args:
            state: any pytree of arrays.
            done: number of finished epochs.
        """
        self._last.save(done, args=ocp.args.StandardSave(state))

    def save_best(self, state: Any, done: int) -> None:
        """Write the best checkpoint, atomically.

        Args:
            state: any pytree of arrays.
            done: number of finished epochs.
        """
        if self._best.latest_step() != done:
            self._best.save(done, args=ocp.args.StandardSave(state))

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
            Its lines, without a last one that was cut off.

        Raises:
            RunError: a line is damaged.
        """
        try:
            return [json.loads(line) for line in self._whole_lines("metrics.jsonl")]
        except ValueError as error:
            raise self._damaged("metrics.jsonl", error) from error

    def layers(self) -> list[dict[str, Any]]:
        """Read `layers.csv`.

        Returns:
            Its lines, numbers as float (`epoch` as int), without a last one that was cut off.

        Raises:
            RunError: a line is damaged.
        """
        numbers = LAYER_FIELDS[2:]
        try:
            return [
                {**row, "epoch": int(row["epoch"]), **{field: float(row[field]) for field in numbers}}
                for row in csv.DictReader(self._whole_lines("layers.csv"))
            ]
        except _DAMAGED as error:
            raise self._damaged("layers.csv", error) from error

    def close(self) -> None:
        """Release the checkpoint managers."""
        self._last.close()
        self._best.close()

    def _whole_lines(self, name: str) -> list[str]:
        path = self.path / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [line for line in lines if line.endswith("\n")]

    def _damaged(self, name: str, error: Exception) -> RunError:
        return RunError(f"--resume: {self.path / name} is damaged ({error}); mend its line, or start anew")

    def _keep_lines_before(self, epoch: int) -> None:
        metrics = [line for line in self.metrics() if line["epoch"] < epoch]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        layers = [row for row in self.layers() if row["epoch"] < epoch]
        write_text(self.path / "layers.csv", "")
        self.append_layers(layers)


def _manager(path: Path) -> ocp.CheckpointManager:
    # Saved before the next epoch starts: the epoch's arrays are donated to it.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path.resolve(), options=options)
