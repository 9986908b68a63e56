"""The pruned model as a Hugging Face folder, written in place block by block.

Files have the source's layout: its header bytes, and every tensor where it was. So a tensor is written at its offset
when its block is done, in any order and again after a stop, and a model with nothing removed comes out byte for byte
as it went in. Until all is written the folder is called `NAME.part`; then it gets a `SHA256SUMS` of its files. Masks
lie beside it: some loaders, vLLM's among them, take every safetensors file of a model's folder for its weights.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError, listed
from farms_jax.programs.files import CHECKSUMS, damaged_files, reserve, write_checksums
from farms_jax.weights import TensorInfo
from farms_jax.weights.safetensors_file import Entry, make_layout, read_layout, read_tensor

from .checkpoints import Checkpoint

MASKS = "masks.safetensors"
_REMEDY = "free space, or name another --out; what was written so far is kept, and the same command goes on from there"


class Output:
    """The folder of a pruned model and its masks beside it, finished or being written."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, layers: Mapping[str, tuple[int, int]], tokenizer: Any = None
    ) -> None:
        """Plan the files for (out, in) layers that get masks; nothing is written yet."""
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self._folder, self._part = folder, folder.with_name(f"{folder.name}.part")
        self._masks = folder.with_name(MASKS)
        # Masks as numpy.packbits writes them: eight inputs to a byte, the first in its highest bit.
        masks = {name: TensorInfo(np.dtype(np.uint8), (out, -(-inputs // 8))) for name, (out, inputs) in layers.items()}
        inputs = json.dumps({name: shape[1] for name, shape in layers.items()})
        mask_layout = make_layout(masks, {"format": "packbits", "inputs": inputs})
        self._weights = checkpoint.shards()
        self._layouts = {self._part / filename: layout for filename, layout in self._weights.items()}
        self._layouts[self._masks] = mask_layout
        self._places: dict[str, tuple[Path, Entry]] = {
            name: (path, entry) for path, layout in self._layouts.items() for name, entry in layout.tensors.items()
        }
        self.finished = not self._incomplete_files(folder)  # it has its final name, and all its weight files
        self.begun = self._part.is_dir()  # by an earlier run that was stopped

    def check(self) -> None:
        """Compare the finished files with their checksums; an InputError names those that differ."""
        if damaged := [*damaged_files(self._folder), *damaged_files(self._folder.parent)]:
            raise InputError(
                f"{listed(map(str, damaged), 3, ', ')}: damaged, or changed since it was written; "
                f"remove {self._folder}, and the same command makes it again"
            )

    def lay_out(self, *, keep: bool) -> list[Path]:
        """Reserve all files and write all but the weights; return weight files that a stopped run left damaged."""
        incomplete = self._incomplete_files(self._part) if self.begun else []
        try:
            self._part.mkdir(parents=True, exist_ok=True)
            self._write_sidecars()
            for path, layout in self._layouts.items():
                path.touch()
                with path.open("r+b") as file:
                    file.truncate(min(path.stat().st_size, layout.size))  # a damaged file may be too long
                    reserve(file.fileno(), layout.size)
                    file.write(layout.header)
        except OSError as error:
            if not keep:  # nothing in the files is worth its space
                shutil.rmtree(self._part, ignore_errors=True)
                self._masks.unlink(missing_ok=True)
            size = sum(layout.size for layout in self._layouts.values())
            raise InputError(_no_room(self._part, size, error)) from error
        return incomplete

    def _incomplete_files(self, folder: Path) -> list[Path]:
        """Return the files of a folder's weights and of masks that are missing, or have another size or header."""
        incomplete = []
        for planned, layout in self._layouts.items():
            path = planned if planned == self._masks else folder / planned.name
            if not path.is_file() or path.stat().st_size != layout.size:
                incomplete.append(path)
                continue
            with path.open("rb") as file:
                if file.read(len(layout.header)) != layout.header:
                    incomplete.append(path)
        return incomplete

    def _write_sidecars(self) -> None:
        """Write all but the weights anew: a killed process may have left a part of a file."""
        for path in self._part.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._weights:
                path.unlink()
        try:
            self._checkpoint.copy_sidecars(self._part, self._tokenizer)
        except (InputError, OSError):
            raise
        except Exception as error:  # tokenizers are in Rust: "No space left on device (os error 28)"
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error

    def write(self, tensors: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None) -> str:
        """Write tensors and masks, (out, in) and True where kept, through to the disk; return their SHA-256."""
        packed = {name: np.packbits(mask, axis=1) for name, mask in (masks or {}).items()}
        files: dict[Path, list[str]] = {}
        stored: dict[str, memoryview] = {}
        for name, array in {**tensors, **packed}.items():
            path, entry = self._places[name]
            files.setdefault(path, []).append(name)
            stored[name] = _bytes(np.ascontiguousarray(self._checkpoint.turn(name, array), entry.info.dtype))
        for path, names in files.items():
            try:
                with path.open("r+b") as file:
                    for name in names:
                        file.seek(self._places[name][1].start)
                        file.write(stored[name])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(_no_room(path, sum(len(stored[name]) for name in names), error)) from error
        return _sha256(stored.items())

    def holds(self, names: Iterable[str], sha256: str | None) -> bool:
        """Return whether the files still hold what one `write` wrote, its tensors and then its masks, in order."""
        try:
            return _sha256((name, _bytes(self._read(name))) for name in names) == sha256
        except InputError:  # the disk has lost this part
            return False

    def read(self, name: str) -> np.ndarray:
        """Return a tensor that was written, a linear as (out, in)."""
        return self._checkpoint.turn(name, self._read(name))

    def _read(self, name: str) -> np.ndarray:
        path, entry = self._places[name]
        return read_tensor(path, name, entry)

    def finish(self) -> None:
        """Write the checksums, and give the folder its final name in place of any older one."""
        try:
            write_checksums(self._part)
            write_checksums(self._masks.parent, [self._masks])
            if self._folder.exists():
                shutil.rmtree(self._folder)
            os.replace(self._part, self._folder)
        except OSError as error:
            raise InputError(
                f"{self._part / CHECKSUMS}: cannot be written ({error.strerror or error}); {_REMEDY}"
            ) from error


def read_masks(run: Path) -> dict[str, np.ndarray]:
    """Return the masks in a run's directory, or beside the model in it: layer -> (out, in) bool, False for zeros."""
    path = next((path for path in (run / MASKS, run.parent / MASKS) if path.is_file()), run / MASKS)
    layout = read_layout(path)
    inputs = json.loads(layout.metadata["inputs"])
    return {
        name: np.unpackbits(read_tensor(path, name, entry), axis=1, count=inputs[name]).astype(bool)
        for name, entry in layout.tensors.items()
    }


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _sha256(contents: Iterable[tuple[str, memoryview]]) -> str:
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _no_room(path: Path, size: int, error: OSError) -> str:
    return f"{path}: cannot write {size / 2**20:.0f} MiB ({error.strerror or error}); {_REMEDY}"
