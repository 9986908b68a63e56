"""The run directory: every finished stage is on disk, so that the same command goes on where it stopped.

RUN/run.json          the card: everything that the numbers depend on, and the numbers
RUN/progress.json     finished stages and blocks, and their checksums: what the card is made from
RUN/layers.csv        layer, weights, score, alpha before and after, sparsity asked for and reached
RUN/model/            the pruned model, a Hugging Face folder; `model.part` until it is whole
RUN/*.png             plots
RUN/.lock             held by the process at work
"""

import contextlib
import csv
import json
import shutil
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.programs.cache import with_checksum, without_checksum
from farms_jax.programs.files import atomic, write_json
from farms_jax.programs.locking import locked


@contextlib.contextmanager
def opened(path: Path, *, fresh: bool = False) -> Generator["RunDirectory"]:
    """Open a run's directory for this process alone, for as long as the `with` block lasts.

    Args:
        path: of the run; its name tells the run from all others. It is made where there is none.
        fresh: forget what was done before.

    Yields:
        The directory.

    Raises:
        InputError: another process is at work there, the directory cannot be written to, or its record is damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise InputError(f"--out: cannot make {path} ({error.strerror}); name another folder") from error
        yield RunDirectory(path, fresh=fresh)


class RunDirectory:
    """Stages of one run, by name, each the JSON that it came to."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read what was done before.

        Args:
            path: of the run, held by this process.
            fresh: remove what was done before, all but the lock.

        Raises:
            InputError: the record is damaged, or what is there cannot be removed.
        """
        self.path = path
        self._record = path / "progress.json"
        if fresh:
            _empty(path, first=self._record)
        try:
            content = self._record.read_text(encoding="utf-8") if self._record.exists() else None
            self._stages = {} if content is None else without_checksum(json.loads(content))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self._record} is damaged ({error}); start anew with --fresh") from error

    def get(self, stage: str, default: Any = None) -> Any:
        """Return what a stage came to, or the default where it is not finished."""
        return self._stages.get(stage, default)

    def put(self, stage: str, result: Any) -> None:
        """Record what a stage came to; a full disk is an `InputError`."""
        before, self._stages[stage] = self._stages.get(stage), json.loads(json.dumps(result, default=str))
        if self._stages[stage] != before or not self._record.exists():
            self._save()

    def forget(self, *stages: str) -> None:
        """Take stages from the record."""
        if gone := set(stages) & set(self._stages):
            self._stages = {stage: result for stage, result in self._stages.items() if stage not in gone}
            self._save()

    def _save(self) -> None:
        try:
            write_json(self._record, with_checksum(self._stages))
        except OSError as error:
            raise InputError(
                f"{self._record}: cannot be written ({error.strerror}); free space, then give the same command again"
            ) from error

    def write_layers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `layers.csv`."""
        rows = list(rows)
        with atomic(self.path / "layers.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _empty(path: Path, first: Path) -> None:
    """Remove all but the lock that is held; `first` before the rest, a record of files that are half gone."""
    try:
        first.unlink(missing_ok=True)
        for inside in path.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            elif inside.name != ".lock":
                inside.unlink()
    except OSError as error:
        raise InputError(f"--fresh: cannot empty {path} ({error}); remove it, or name another --out") from error
