"""The record of a run: every finished stage is kept on disk, so that the same command resumes where it stopped.

RUN/run.json          the card: everything that the numbers depend on, and the numbers
RUN/progress.json     finished stages and blocks, and their checksums; the card is made from it
RUN/layers.csv        layer, weights, score, alpha before and after, sparsity asked for and reached
RUN/model/            the pruned model, a Hugging Face folder; `model.part` until it is complete
RUN/masks.safetensors the masks, see `output.read_masks`, and their checksum in `SHA256SUMS`
RUN/*.png             plots
RUN/.lock             held by the process that works on the run
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from farms_jax.errors import InputError
from farms_jax.programs.cache import with_checksum, without_checksum
from farms_jax.programs.files import write_json
from farms_jax.programs.locking import locked
from farms_jax.programs.memory import peak_memory

FORMAT = 3  # of progress.json; part of the key of a run, so that none goes on from a record that it cannot read

Result = TypeVar("Result")


@contextlib.contextmanager
def opened(path: Path, *, fresh: bool = False) -> Generator["Record"]:
    """Open the record in a run's directory, for this process alone; `fresh` empties the directory first."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise InputError(f"--out: cannot make {path} ({error.strerror}); name another folder") from error
        yield Record(path, fresh=fresh)


class Record:
    """Results of the finished stages of one run, by name; the one place where they turn into JSON and back."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read the record in a directory that this process holds; `fresh` removes all there but the lock."""
        self.path = path
        self._file = path / "progress.json"
        self._stages: dict[str, Any] = {}
        if fresh:
            self._remove_all()
        try:
            if self._file.exists():
                self._stages = without_checksum(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self._file} is damaged ({error}); start anew with --fresh") from error

    def stage(self, name: str, compute: Callable[[], Result], kind: type[Result] | None = None) -> Result:
        """Return the result of a stage, computed where it is not on record: a dataclass of this `kind`, or JSON.

        It is always read from the record, so that a run that was stopped computes with the same numbers.
        """
        if name not in self._stages:
            start = time.perf_counter()
            result = compute()
            self.forget("card")  # it was made from an earlier result
            self.put("seconds", {**self.get("seconds", {}), name: time.perf_counter() - start})
            self.put("peak_memory_bytes", self.peak_memory())
            self.put(name, result)  # last: whatever is on record has its seconds and its memory
        content: Any = self._stages[name]
        return content if kind is None else kind(**content)

    def peak_memory(self) -> int:
        """Return the most bytes of memory that any process of the run has held."""
        return max(peak_memory(), self.get("peak_memory_bytes", 0))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the result under a name, as JSON reads it."""
        return self._stages.get(name, default)

    def put(self, name: str, result: Any) -> None:
        """Put a result on record; a full disk is an InputError, a number that is not finite a ValueError."""
        # Through JSON, so that this process goes on with exactly what a resumed one would read.
        text = json.dumps(result, default=_encode, allow_nan=False)
        before, self._stages[name] = self._stages.get(name), json.loads(text)
        if self._stages[name] != before or not self._file.exists():
            self._save()

    def forget(self, *names: str) -> None:
        """Remove results from the record."""
        if gone := set(names) & set(self._stages):
            self._stages = {name: result for name, result in self._stages.items() if name not in gone}
            self._save()

    def _remove_all(self) -> None:
        """Remove all but the lock that is held: first the record, which would tell of files that are half gone."""
        try:
            self._file.unlink(missing_ok=True)
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        except OSError as error:
            raise InputError(
                f"--fresh: cannot empty {self.path} ({error}); remove it, or name another --out"
            ) from error

    def _save(self) -> None:
        try:
            write_json(self._file, with_checksum(self._stages))
        except OSError as error:
            raise InputError(
                f"{self._file}: cannot be written ({error.strerror}); free space, then give the same command again"
            ) from error


def _encode(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
