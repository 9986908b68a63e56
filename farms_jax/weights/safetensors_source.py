"""Safetensors as weights: a file, a folder of one model, shards with an index."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from farms_jax._axes import TORCH_AXES
from farms_jax.errors import InputError
from farms_jax.weights.safetensors_file import TensorInfo, read_tensor
from farms_jax.weights.shards import INDEX, WEIGHTS, Shards, read_files, read_indexed
from farms_jax.weights.source import WeightSource

_SHARD = re.compile(r"(?P<start>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


class SafetensorsSource(WeightSource):
    """Weights in safetensors files of one folder."""

    def __init__(self, path: Path, name: str, folder: Path, shards: Shards) -> None:
        """Describe files whose headers are read.

        Args:
            path: of the file or the folder that was asked for.
            name: for people.
            folder: of the files.
            shards: the files.
        """
        self._folder, self._shards = folder, shards
        tensors = {
            tensor: TensorInfo(entry.dtype, entry.shape)
            for header in shards.headers.values()
            for tensor, entry in header.tensors.items()
        }
        super().__init__(path, name, "safetensors", TORCH_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        filename = self._shards.home[name]
        return read_tensor(self._folder / filename, name, self._shards.headers[filename].tensors[name])


def open_safetensors(path: Path) -> SafetensorsSource:
    """Open one file.

    Args:
        path: of the file.

    Returns:
        Its weights.

    Raises:
        InputError: the file is damaged or holds nothing.
    """
    return SafetensorsSource(path, path.stem, path.parent, read_files(path.parent, [path.name]))


def open_safetensors_folder(path: Path, filenames: Iterable[str]) -> SafetensorsSource | None:
    """Open the safetensors files of a folder.

    Args:
        path: of the folder.
        filenames: names of all files in it.

    Returns:
        The weights of `model.safetensors`, or of the shards of an index, or of all safetensors files; `None` where
        there are none of these.

    Raises:
        InputError: a file is missing or damaged, or files disagree.
    """
    files = [name for name in filenames if name.endswith(".safetensors") and not name.startswith(".")]
    indices = [name for name in filenames if name.endswith(".safetensors.index.json")]
    if WEIGHTS in files:
        shards = read_files(path, [WEIGHTS])
    elif indices:
        if INDEX not in indices and len(indices) > 1:
            raise InputError(f"{path}: it has several models ({', '.join(indices)}); give a file of one of them")
        shards = read_indexed(path / (INDEX if INDEX in indices else indices[0]))
    elif files:
        _check_numbers(path, files)
        shards = read_files(path, files)
    else:
        return None
    return SafetensorsSource(path, path.resolve().name, path, shards)


def _check_numbers(folder: Path, filenames: Iterable[str]) -> None:
    """Without an index, the numbers in the shards' names tell whether all are there."""
    found: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, filenames)):
        found.setdefault((match["start"], match["count"]), set()).add(int(match["number"]))
    for (start, count), numbers in found.items():
        if missing := sorted(set(range(1, int(count) + 1)) - numbers):
            number = str(missing[0]).zfill(len(count))
            raise InputError(
                f"{folder / f'{start}-{number}-of-{count}.safetensors'}: this shard is missing"
                f"{f', as are {len(missing) - 1} more' if len(missing) > 1 else ''}; download it again"
            )
