"""Checkpoints of a training: each is a folder named by its finished steps, written atomically and with checksums.

A checkpoint holds

    default/                    the arrays, by Orbax
    partial_epoch.json          sums of an unfinished epoch, where the checkpoint is in the middle of one
    metrics.jsonl, layers.csv   the lines of the run up to there
    SHA256SUMS                  checksums of all these
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from farms_jax.errors import InputError, one_line
from farms_jax.programs.files import damaged_files, write_checksums, write_json

_ARRAYS, _PARTIAL_EPOCH = "default", "partial_epoch.json"
_MARGIN = 2**20  # bytes that a checkpoint takes beside its arrays, at most


class Progress(NamedTuple):
    """Where a training stands.

    Attributes:
        state: pytree of arrays.
        done: finished steps in all.
        partial_epoch: sums over the steps of the unfinished epoch by name; empty between epochs.
    """

    state: Any
    done: int
    partial_epoch: dict[str, float]


class Checkpoints:
    """The newest checkpoints of a training, in one folder; older ones are removed."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Open the folder, made where there is none; the newest `keep` checkpoints stay."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._keep = folder, keep

    def restore(self, like: Any) -> tuple[Path | None, Progress]:
        """Return the newest checkpoint whose checksums are right, and its folder; newer ones are named and removed.

        Without a checkpoint the training stands at its start, with the state `like`; the folder is `None`.

        Raises:
            InputError: all checkpoints are damaged, or one is of other settings.
        """
        damaged: dict[Path, str] = {}
        for checkpoint in reversed(self._by_step()):
            if files := damaged_files(checkpoint, exact=True):
                damaged[checkpoint] = ", ".join(str(file.relative_to(checkpoint)) for file in files)
                continue
            progress = self._read(checkpoint, like)
            for other, names in damaged.items():
                note = f"damaged ({names}); going on from {checkpoint.name}, the checkpoint before it"
                sys.stderr.write(f"{other}: {note}\n")
                _remove(other)
            return checkpoint, progress
        if damaged:
            found = "; ".join(f"{checkpoint} ({names})" for checkpoint, names in damaged.items())
            raise InputError(f"--resume: no checkpoint is whole: {found}; put these files back, or start anew")
        return None, Progress(like, 0, {})

    def save(self, progress: Progress, lines: Iterable[Path]) -> Path:
        """Return the folder of a new checkpoint, with copies of the files in `lines`; the write is atomic.

        Raises:
            InputError: it cannot be written; the checkpoints before it are unchanged.
        """
        part, whole = self._folder / f"{progress.done}.part", self._folder / str(progress.done)
        self._remove_drafts()  # left by a process that was killed
        try:
            _check_space(self._folder, progress.state)
            arrays = ocp.args.Composite(**{_ARRAYS: ocp.args.StandardSave(progress.state)})
            with _checkpointer() as checkpointer:
                checkpointer.save(part.resolve(), args=arrays)
            if progress.partial_epoch:
                write_json(part / _PARTIAL_EPOCH, progress.partial_epoch)
            for file in lines:
                shutil.copyfile(file, part / file.name)
            write_checksums(part)
        except Exception as error:  # any kind: Orbax reports a full disk as a ValueError
            self._remove_drafts()  # frees the space they take
            why = " ".join(str(error).split())[-300:]
            raise InputError(f"{whole}: cannot be written (... {why}); make room, then --resume goes on") from error
        if whole.exists():
            _remove(whole)
        part.rename(whole)
        for old in self._by_step()[: -self._keep]:
            _remove(old)
        return whole

    def _read(self, checkpoint: Path, like: Any) -> Progress:
        abstract = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        try:
            with _checkpointer() as checkpointer:
                found = checkpointer.restore(checkpoint.resolve(), args=ocp.args.Composite(**{_ARRAYS: abstract}))
        except Exception as error:  # which one depends on what differs
            raise InputError(
                f"--resume: the checkpoint {checkpoint} is not of these settings ({one_line(error)}); start anew"
            ) from error
        partial_epoch = checkpoint / _PARTIAL_EPOCH
        sums = json.loads(partial_epoch.read_text(encoding="utf-8")) if partial_epoch.is_file() else {}
        return Progress(found[_ARRAYS], int(checkpoint.name), sums)

    def _by_step(self) -> list[Path]:
        found = (child for child in self._folder.iterdir() if child.name.isdecimal())
        return sorted(found, key=lambda child: int(child.name))

    def _remove_drafts(self) -> None:
        for child in self._folder.glob("*.part*"):
            shutil.rmtree(child)


def _checkpointer() -> ocp.Checkpointer:
    # Synchronous: the arrays of a step are donated to the next one, so nothing may read them in the background.
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _check_space(folder: Path, state: Any) -> None:
    """Raise an error if the disk is too full, before each of Orbax's threads prints a traceback for it."""
    need, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _MARGIN, shutil.disk_usage(folder).free
    if need > free:
        sizes = f"{need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint under the name of a draft: half removed it must not pass for a checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.old.part")))
