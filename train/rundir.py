"""The run directory: what a run writes, and how it is picked up again.

    RUN/config.json                 settings, data set and its fingerprint, versions
    RUN/summary.json, *.png         accuracies over the seeds, plots
    RUN/seed43/metrics.jsonl        one line per epoch
    RUN/seed43/layers.csv           epoch, layer, alpha, lr_scale, learning_rate
    RUN/seed43/checkpoints/last     Orbax, after every epoch
    RUN/seed43/checkpoints/best     Orbax, of the best test accuracy

An epoch's lines are written before its checkpoint; a resumed run drops the lines of epochs that its checkpoint
does not have, so no line is lost and none is there twice.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from farms_jax.files import write_json, write_text
from train.config import Config

LAYER_FIELDS = ("epoch", "layer", "alpha", "lr_scale", "learning_rate")


class RunError(ValueError):
    """A run directory cannot be used; the message says why, and what to do."""


def write_config(run: Path, config: Config, facts: dict[str, Any]) -> None:
    """Write `config.json`: the settings, and facts about data and versions."""
    write_json(run / "config.json", {"config": dataclasses.asdict(config), **facts})


def read_config(run: Path) -> tuple[Config, dict[str, Any]]:
    """Read `config.json` back.

    Args:
        run: a run directory.

    Returns:
        The settings, and everything else in the file.

    Raises:
        RunError: there is no such file, or it is damaged or of another version.
    """
    path = run / "config.json"
    if not path.is_file():
        raise RunError(f"--resume {run}: there is no {path.name} in it; give the directory that a run printed")
    try:
        facts = json.loads(path.read_text())
        settings = facts.pop("config")
        for field in ("data_dir", "out"):
            settings[field] = None if settings[field] is None else Path(settings[field])
        return Config(**{**settings, "seeds": tuple(settings["seeds"])}), facts
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"--resume {run}: {path} is damaged or of another version ({error}); start anew") from error


class SeedDirectory:
    """Files of one seed's training."""

    def __init__(self, path: Path) -> None:
        """Open the directory, made where there is none.

        Args:
            path: of the seed.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._last = _manager(path / "checkpoints" / "last")
        self._best = _manager(path / "checkpoints" / "best")

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
        """Write the last checkpoint, atomically."""
        self._last.save(done, args=ocp.args.StandardSave(state))

    def save_best(self, state: Any, done: int) -> None:
        """Write the best checkpoint, atomically."""
        if self._best.latest_step() != done:
            self._best.save(done, args=ocp.args.StandardSave(state))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def append_layers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to `layers.csv`."""
        path = self.path / "layers.csv"
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, LAYER_FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`, without a last one that was cut off."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def layers(self) -> list[dict[str, Any]]:
        """Lines of `layers.csv`, numbers as float, without a last one that was cut off."""
        path = self.path / "layers.csv"
        if not path.exists():
            return []
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        numbers = ("alpha", "lr_scale", "learning_rate")
        return [
            {**row, "epoch": int(row["epoch"]), **{field: float(row[field]) for field in numbers}}
            for row in csv.DictReader(whole)
        ]

    def _keep_lines_before(self, epoch: int) -> None:
        metrics = [line for line in self.metrics() if line["epoch"] < epoch]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        layers = [row for row in self.layers() if row["epoch"] < epoch]
        write_text(self.path / "layers.csv", "")
        self.append_layers(layers)

    def close(self) -> None:
        """Release the checkpoint managers."""
        self._last.close()
        self._best.close()


def _manager(path: Path) -> ocp.CheckpointManager:
    # Saved before the next epoch starts: the epoch's arrays are donated to it.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path.resolve(), options=options)
