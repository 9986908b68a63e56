"""The pruned model as a Hugging Face folder, written in place block by block.

Files have the layout of the source's: its header bytes, and every tensor where it was. So a tensor is written at its
offset when its block is done, in any order and again after a stop, and a model with nothing removed comes out byte for
byte as it went in. Until all is written the folder is called `NAME.part`.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.files import reserve
from farms_jax.weights.safetensors_file import TensorInfo, make_header, parse_header, read_header, read_tensor
from prune.checkpoints import Checkpoint, Shard

MASKS = "masks.safetensors"


class Output:
    """A folder in the making.

    Attributes:
        finished: the folder has its name, and all its files.
        resumed: all its files were there already, from a run that was stopped.
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
        self.finished, self.resumed = (
            all(_is_laid_out(place / shard.filename, shard) for shard in self._shards) for place in (folder, self._part)
        )

    def lay_out(self) -> None:
        """Take the space that the files need, and write all but weights; files of a run that was stopped are kept.

        Raises:
            InputError: no space, or no right to write there; a folder that was not there before is gone again.
        """
        try:
            self._part.mkdir(parents=True, exist_ok=True)
            self._checkpoint.copy_sidecars(self._part, self._tokenizer)
            for shard in self._shards:
                _reserve(self._part / shard.filename, shard)
        except OSError as error:
            if not self.resumed:  # nothing in it is worth the space
                shutil.rmtree(self._part, ignore_errors=True)
            raise InputError(_no_room(self._part, sum(shard.size for shard in self._shards), error)) from error

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Put tensors in their places, in their stored dtype, and see them to the disk.

        Args:
            tensors: by name in the checkpoint.

        Raises:
            InputError: the disk is full or failing.
        """
        files: dict[Path, list[str]] = {}
        for name in tensors:
            files.setdefault(self._place[name][0], []).append(name)
        for path, names in files.items():
            try:
                with path.open("r+b") as file:
                    for name in names:
                        file.seek(self._place[name][1])
                        array = np.ascontiguousarray(tensors[name], self._info[name].dtype)
                        file.write(array.reshape(-1).view(np.uint8).data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(_no_room(path, sum(tensors[name].nbytes for name in names), error)) from error

    def write_masks(self, masks: Mapping[str, np.ndarray]) -> None:
        """Put masks (out, in), True where a weight is kept, into the sidecar; see `read_masks`."""
        self.write({name: np.packbits(mask, axis=1) for name, mask in masks.items()})

    def copy(self, names: Iterable[str], checkpoint: Checkpoint) -> None:
        """Put tensors as they are in the source, one at a time."""
        for name in names:
            self.write({name: checkpoint.read(name)})

    def read(self, name: str) -> np.ndarray:
        """Return a tensor that was written."""
        path, start, stop = self._place[name]
        info = self._info[name]
        with path.open("rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(stop - start), info.dtype).reshape(info.shape)

    def finish(self) -> Path:
        """Give the folder its name, in place of one that was there; returns it."""
        if self._folder.exists():
            shutil.rmtree(self._folder)
        os.replace(self._part, self._folder)
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


def _reserve(path: Path, shard: Shard) -> None:
    path.touch()
    with path.open("r+b") as file:
        reserve(file.fileno(), shard.size)
        file.write(shard.header)


def _no_room(path: Path, size: int, error: OSError) -> str:
    return (
        f"{path}: cannot write {size / 2**20:.0f} MiB ({error.strerror}); free space, or name another --out; "
        "what was written so far is kept, and the same command goes on from there"
    )
