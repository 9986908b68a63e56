"""The run directory: what a training writes, and how it resumes.

    RUN/.lock                               held by the one process that works here
    RUN/config.json                         settings, data set and its fingerprint, versions
    RUN/seed43/metrics.jsonl                one line per epoch
    RUN/seed43/layers.csv                   epoch, layer, alpha, lr_scale, learning_rate
    RUN/seed43/checkpoints/last/390         after 390 steps; the last two checkpoints are kept
    RUN/seed43/checkpoints/best/390         of the best epoch by the program's own measure

A checkpoint is written after every epoch, and at the step where a run is stopped or its loss is not finite. A run
resumes from the newest checkpoint whose checksums are right, with the lines that are in it: none is lost, repeated or
damaged. See `checkpoints` for what a checkpoint holds.
"""

import contextlib
import csv
import json
import shlex
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError, one_line
from farms_jax.programs.checkpoints import Checkpoints, Progress
from farms_jax.programs.config_file import PARSE_ERRORS
from farms_jax.programs.files import atomic
from farms_jax.programs.locking import locked
from farms_jax.programs.stopping import Stopped

LAYER_FIELDS = ("epoch", "layer", "alpha", "lr_scale", "learning_rate")
_LINES = ("metrics.jsonl", "layers.csv")


@contextlib.contextmanager
def at_work(run: Path) -> Generator[None]:
    """Lock a run directory, made where there is none, and say how to resume where the work inside is stopped.

    Raises:
        InputError: another process is at work there.
        Stopped: the work was stopped by Ctrl-C or SIGTERM; the message says how to resume.
    """
    with locked(run):
        try:
            yield
        except Stopped as stopped:
            raise Stopped(stopped.signal, f"; go on with --resume {shlex.quote(str(run))}") from stopped


class SeedDirectory:
    """Files of one seed's training."""

    def __init__(self, path: Path) -> None:
        """Open the directory, made where there is none."""
        self.path = path
        self._last = Checkpoints(path / "checkpoints" / "last", keep=2)  # the one before is for when it is damaged
        self._best = Checkpoints(path / "checkpoints" / "best", keep=1)

    def restore(self, like: Any) -> Progress:
        """Return the newest checkpoint that is not damaged, and put the lines of that moment back.

        Without a checkpoint the training stands at its start, with the state `like`, which gives the shapes too.

        Raises:
            InputError: all checkpoints are damaged, or one is of other settings.
        """
        checkpoint, progress = self._last.restore(like)
        for name in _LINES:
            if checkpoint is not None and (checkpoint / name).is_file():
                with atomic(self.path / name) as part:
                    shutil.copyfile(checkpoint / name, part)
            else:
                (self.path / name).unlink(missing_ok=True)
        return progress

    def save(self, progress: Progress) -> Path:
        """Return the folder of a new checkpoint to resume from, with the lines so far, written atomically.

        Raises:
            InputError: it cannot be written; the checkpoints before it are unchanged.
        """
        return self._last.save(progress, self._files())

    def save_best(self, progress: Progress) -> Path:
        """Return the folder of the best epoch's checkpoint, which replaces the one before; otherwise as `save`."""
        return self._best.save(progress, self._files())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`: `epoch`, counted from 0, and whatever else was measured."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def append_layers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to `layers.csv`: `LAYER_FIELDS` of every layer."""
        path = self.path / "layers.csv"
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, LAYER_FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`.

        Raises:
            InputError: a line is damaged.
        """
        return self._read("metrics.jsonl", lambda lines: map(json.loads, lines))

    def layers(self) -> list[dict[str, Any]]:
        """Return the rows of `layers.csv`, numbers as float (`epoch` as int).

        Raises:
            InputError: a line is damaged.
        """
        return self._read("layers.csv", lambda lines: map(_with_numbers, csv.DictReader(lines)))

    def _files(self) -> list[Path]:
        return [self.path / name for name in _LINES if (self.path / name).is_file()]

    def _read(self, name: str, parse: Callable[[list[str]], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return what the lines of a file say; nothing where there is no file."""
        path = self.path / name
        if not path.exists():
            return []
        try:
            return list(parse(path.read_text(encoding="utf-8").splitlines(keepends=True)))
        except PARSE_ERRORS as error:
            raise InputError(
                f"{path} is damaged ({one_line(error)}); --resume puts it back as the last checkpoint has it"
            ) from error


def _with_numbers(row: dict[str, str]) -> dict[str, Any]:
    return {**row, "epoch": int(row["epoch"]), **{field: float(row[field]) for field in LAYER_FIELDS[2:]}}
