"""The run directory: every finished stage is on disk, so that the same command goes on where it stopped.

RUN/run.json          the card: everything that the numbers depend on, and the numbers
RUN/progress.json     finished stages and blocks, until the card is written; kept as its source
RUN/layers.csv        layer, weights, score, alpha before and after, sparsity asked for and reached
RUN/model/            the pruned model, a Hugging Face folder; `model.part` until it is whole
RUN/*.png             plots
"""

import csv
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.files import atomic, write_json


class RunDirectory:
    """Stages of one run, by name, each the JSON that it came to."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Open a run's directory, made where there is none.

        Args:
            path: of the run; its name tells the run from all others.
            fresh: forget what was done before.

        Raises:
            InputError: the directory cannot be written to, or its record is damaged.
        """
        self.path = path
        self._record = path / "progress.json"
        try:
            if fresh and path.exists():
                self._record.unlink(missing_ok=True)  # first: a record of files that are half gone would be believed
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: cannot make {path} ({error.strerror}); name another folder") from error
        try:
            self._stages = json.loads(self._record.read_text(encoding="utf-8")) if self._record.exists() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"{self._record} is damaged ({error}); start anew with --fresh") from error

    def get(self, stage: str, default: Any = None) -> Any:
        """Return what a stage came to, or the default where it is not finished."""
        return self._stages.get(stage, default)

    def put(self, stage: str, result: Any) -> None:
        """Record what a stage came to; a full disk is an `InputError`."""
        self._stages[stage] = json.loads(json.dumps(result))
        self._save()

    def forget(self, *stages: str) -> None:
        """Take stages from the record."""
        if gone := set(stages) & set(self._stages):
            self._stages = {stage: result for stage, result in self._stages.items() if stage not in gone}
            self._save()

    def _save(self) -> None:
        try:
            write_json(self._record, self._stages)
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
