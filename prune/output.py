"""The pruned model as a Hugging Face folder, written in place block by block.

Files have the layout of the source's: its header bytes, and every tensor where it was. So a tensor is written at its
offset when its block is done, in any order and again after a stop, and a model with nothing removed comes out byte for
byte as it went in. Until all is written the folder is called `NAME.part`; then it has a `SHA256SUMS` of its files.
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

from farms_jax.errors import InputError
from farms_jax.programs.files import CHECKSUMS, damaged_files, reserve, write_checksums
from farms_jax.weights.safetensors_file import TensorInfo, make_header, parse_header, read_header, read_tensor

from .checkpoints import Checkpoint, Shard

MASKS = "masks.safetensors"
_REMEDY = "free space, or name another --out; what was written so far is kept, and the same command goes on from there"


class Output:
    """A folder in the making.

    Attributes:
        finished: the folder has its name, and all its weight files.
        begun: there is a folder in the making, of a run that was stopped.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, layers: Mapping[str, tuple[int, int]], tokenizer: Any = None
    ) -> None:
        """Plan the files; nothing is written yet.

        Args:
            folder: where the model will be.
            checkpoint: the model that is pruned.
            layers: (out, in) of each layer that gets a mask, by name.
            tokenizer: goes with the model instead of its own, where one is given.
        """
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self._folder, self._part = folder, folder.with_name(f"{folder.name}.part")
        self._info = dict(checkpoint.tensors)
        self._shards = [*checkpoint.shards(), _mask_shard(layers)]
        self._place = {
            name: (self._part / shard.filename, *span) for shard in self._shards for name, span in shard.tensors.items()
        }
        self._info |= {name: TensorInfo(np.dtype(np.uint8), packed_shape(shape)) for name, shape in layers.items()}
        self.finished = not self._damaged_shards(folder)
        self.begun = self._part.is_dir()

    def check(self) -> None:
        """Make sure that the finished folder is as it was written.

        Raises:
            InputError: it is not; the message names the files.
        """
        if damaged := damaged_files(self._folder):
            named = ", ".join(map(str, damaged[:3])) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
            raise InputError(
                f"{named}: damaged, or changed since it was written; remove {self._folder}, and the same command "
                "makes it again"
            )

    def lay_out(self, *, keep: bool) -> list[Path]:
        """Take the space that the files need, and write all but weights; what a stopped run wrote is kept.

        Args:
            keep: there is something in the folder that is worth its space.

        Returns:
            Weight files that a stopped run left and that were not whole; they are again, without what was lost.

        Raises:
            InputError: no space, or no right to write there; a folder with nothing worth keeping is gone again.
        """
        damaged = self._damaged_shards(self._part) if self.begun else []
        try:
            self._part.mkdir(parents=True, exist_ok=True)
            self._clear()
            self._copy_sidecars()
            for shard in self._shards:
                _reserve(self._part / shard.filename, shard)
        except OSError as error:
            if not keep:
                shutil.rmtree(self._part, ignore_errors=True)
            raise InputError(_no_room(self._part, sum(shard.size for shard in self._shards), error)) from error
        return damaged

    def _copy_sidecars(self) -> None:
        try:
            self._checkpoint.copy_sidecars(self._part, self._tokenizer)
        except (InputError, OSError):
            raise
        except Exception as error:  # of tokenizers, which are in Rust: "No space left on device (os error 28)"
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error

    def _damaged_shards(self, folder: Path) -> list[Path]:
        return [folder / shard.filename for shard in self._shards if not _is_laid_out(folder / shard.filename, shard)]

    def _clear(self) -> None:
        """Remove what a process that was killed left half written: all but the weights is written anew."""
        weights = {shard.filename for shard in self._shards}
        for path in self._part.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in weights:
                path.unlink()

    def write(self, tensors: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None) -> str:
        """Put tensors in their places, in their stored dtype, and see them to the disk.

        Args:
            tensors: by name in the checkpoint.
            masks: (out, in) of layers, True where a weight is kept; they go into the sidecar, see `read_masks`.

        Returns:
            SHA-256 of what was written, for `holds`.

        Raises:
            InputError: the disk is full or failing.
        """
        packed = {name: np.packbits(mask, axis=1) for name, mask in (masks or {}).items()}
        stored = {name: _bytes(array, self._info[name].dtype) for name, array in {**tensors, **packed}.items()}
        files: dict[Path, list[str]] = {}
        for name in stored:
            files.setdefault(self._place[name][0], []).append(name)
        for path, names in files.items():
            try:
                with path.open("r+b") as file:
                    for name in names:
                        file.seek(self._place[name][1])
                        file.write(stored[name])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(_no_room(path, sum(len(stored[name]) for name in names), error)) from error
        return _sha256(stored.items())

    def holds(self, names: Iterable[str], sha256: str | None) -> bool:
        """Read what was written, and compare.

        Args:
            names: of the tensors that `write` was given, and of the layers whose masks it was, in that order.
            sha256: what it returned.

        Returns:
            Whether it is there, unchanged.
        """
        try:
            return _sha256((name, self._read(name)) for name in names) == sha256
        except OSError:  # a part of the disk that cannot be read
            return False

    def copy(self, names: Iterable[str], checkpoint: Checkpoint) -> list[str]:
        """Put tensors as they are in the source, one at a time; returns the SHA-256 of each."""
        return [self.write({name: checkpoint.read(name)}) for name in names]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor that was written."""
        info = self._info[name]
        return np.frombuffer(self._read(name), info.dtype).reshape(info.shape)

    def _read(self, name: str) -> bytes:
        path, start, stop = self._place[name]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def finish(self) -> Path:
        """Write the checksums, and give the folder its name, in place of one that was there.

        Returns:
            The folder.

        Raises:
            InputError: the disk is full or failing.
        """
        try:
            write_checksums(self._part)
            if self._folder.exists():
                shutil.rmtree(self._folder)
            os.replace(self._part, self._folder)
        except OSError as error:
            raise InputError(
                f"{self._part / CHECKSUMS}: cannot be written ({error.strerror or error}); {_REMEDY}"
            ) from error
        return self._folder


def packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of a packed mask: eight inputs to a byte, the first in its highest bit."""
    return shape[0], -(-shape[1] // 8)


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    """Read the masks of a pruned model.

    Args:
        folder: of the model.

    Returns:
        Layer -> (out, in) bool, True where a weight is kept.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = folder / MASKS
    header = read_header(path)
    inputs = json.loads(header.metadata["inputs"])
    return {
        name: np.unpackbits(read_tensor(path, name, entry), axis=1, count=inputs[name]).astype(bool)
        for name, entry in header.tensors.items()
    }


def _mask_shard(layers: Mapping[str, tuple[int, int]]) -> Shard:
    info = {name: TensorInfo(np.dtype(np.uint8), packed_shape(shape)) for name, shape in layers.items()}
    header = make_header(info, {"format": "packbits", "inputs": json.dumps({k: v[1] for k, v in layers.items()})})
    size = len(header) + sum(int(np.prod(entry.shape)) for entry in info.values())
    entries = parse_header(header, size, MASKS).tensors
    return Shard(MASKS, header, {name: (entry.start, entry.stop) for name, entry in entries.items()}, size)


def _is_laid_out(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _bytes(array: np.ndarray, dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _sha256(contents: Iterable[tuple[str, bytes | memoryview]]) -> str:
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _reserve(path: Path, shard: Shard) -> None:
    path.touch()
    with path.open("r+b") as file:
        file.truncate(min(path.stat().st_size, shard.size))  # of a damaged file that is too long
        reserve(file.fileno(), shard.size)
        file.write(shard.header)


def _no_room(path: Path, size: int, error: OSError) -> str:
    return f"{path}: cannot write {size / 2**20:.0f} MiB ({error.strerror or error}); {_REMEDY}"
