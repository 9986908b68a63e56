"""Safetensors as weights: one file, a folder with one model, shards with an index as Hugging Face lays them out."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from farms_jax._axes import LeafAxes
from farms_jax._torch_axes import torch
from farms_jax.errors import InputError, listed, printable, short_repr
from farms_jax.weights import mxfp4
from farms_jax.weights.reading import DOWNLOAD_AGAIN, TensorInfo, part_of, read_json
from farms_jax.weights.safetensors_file import Entry, read_layout, read_tensor
from farms_jax.weights.source import WeightSource

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<start>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


class SafetensorsSource(WeightSource):
    """Weights in safetensors files of one folder.

    Attributes:
        layouts: File name -> where everything is in the file.
        file_of: Tensor -> file name.
    """

    def __init__(self, path: Path, filenames: Iterable[str] = ()) -> None:
        """Read the headers of a model's files in the folder `path`; or of the file `path`, without `filenames`."""
        self._folder = path if path.is_dir() else path.parent
        self.layouts = {filename: read_layout(self._folder / filename) for filename in filenames or [path.name]}
        self.file_of: dict[str, str] = {}
        for filename, layout in self.layouts.items():
            for name in layout.tensors:
                if name in self.file_of:
                    raise InputError(
                        f"{self._folder}: {name} is in two shards, {self.file_of[name]} and {filename}; "
                        "download them again"
                    )
                self.file_of[name] = filename
        tensors = {name: entry.info for layout in self.layouts.values() for name, entry in layout.tensors.items()}
        self._packed = mxfp4.unpacked(tensors)
        for packed in self._packed:
            del tensors[packed + mxfp4.BLOCKS], tensors[packed + mxfp4.SCALES]
        tensors |= self._packed
        name = path.resolve().name if path == self._folder else path.stem
        super().__init__(path, name, "safetensors", torch, tensors)

    def _read(self, name: str) -> np.ndarray:
        return self._read_values(name, 0, self.tensors[name].shape)

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        part = part_of(self.tensors[name].shape, axes, index)
        return None if part is None else self._read_values(name, *part)

    def _read_values(self, name: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Read the part of this number and shape of a tensor."""
        if name not in self._packed:
            return self._read_stored(name, number, shape)
        *rows, cols = shape
        scales = self._read_stored(name + mxfp4.SCALES, number, (*rows, cols // 32))
        return mxfp4.dequantize(self._read_stored(name + mxfp4.BLOCKS, number, (*scales.shape, 16)), scales)

    def _read_stored(self, name: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        filename = self.file_of[name]
        entry = self.layouts[filename].tensors[name]
        part = TensorInfo(entry.info.dtype, shape)
        start = entry.start + number * part.nbytes
        return read_tensor(self._folder / filename, name, Entry(part, start, start + part.nbytes))


def open_indexed(path: Path) -> SafetensorsSource:
    """Open the shards that an index names; they lie beside it."""
    weight_map = _read_weight_map(path)
    filenames = sorted(set(weight_map.values()))
    for filename in filenames:
        if not (path.parent / filename).is_file():
            raise InputError(f"{path.parent / filename}: this shard is missing, {path.name} names it; {DOWNLOAD_AGAIN}")
    source = SafetensorsSource(path.parent, filenames)
    faults = [
        f"{printable(name)} (not in {printable(filename)})"
        for name, filename in weight_map.items()
        if source.file_of.get(name) != filename
    ]
    faults += [
        f"{printable(name)} (in {printable(filename)}, not in the index)"
        for name, filename in source.file_of.items()
        if name not in weight_map
    ]
    if faults:
        raise InputError(f"{path}: it disagrees with its shards: {listed(faults)}; download all")
    return source


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return an index's table, tensor -> file name."""
    weight_map = read_json(path, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no weight_map; {DOWNLOAD_AGAIN}")
    for name, filename in weight_map.items():
        # A name with a folder in it would make an export write outside its own; most file systems allow 255 bytes.
        is_plain = isinstance(filename, str) and Path(filename).name == filename and filename.isprintable()
        if not is_plain or len(filename.encode()) > 255:
            raise InputError(
                f"{path}: {printable(name)} is in {short_repr(filename)}, no plain file name; {DOWNLOAD_AGAIN}"
            )
    return weight_map


def open_safetensors_folder(path: Path, filenames: Iterable[str]) -> SafetensorsSource | None:
    """Open `model.safetensors`, or the shards of an index, or all safetensors files of a folder; `None` without any."""
    files = [name for name in filenames if name.endswith(".safetensors") and not name.startswith(".")]
    indices = [name for name in filenames if name.endswith(".safetensors.index.json")]
    if WEIGHTS in files:
        return SafetensorsSource(path, [WEIGHTS])
    if indices:
        if INDEX not in indices and len(indices) > 1:
            raise InputError(f"{path}: it has several models ({', '.join(indices)}); give a file of one of them")
        return open_indexed(path / (INDEX if INDEX in indices else indices[0]))
    if not files:
        return None
    _check_numbers(path, files)
    return SafetensorsSource(path, files)


def _check_numbers(folder: Path, filenames: Iterable[str]) -> None:
    """Check by the numbers in their names that all shards exist, where no index tells."""
    found: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, filenames)):
        found.setdefault((match["start"], match["count"]), set()).add(int(match["number"]))
    for (start, count), numbers in found.items():
        if missing := sorted(set(range(1, int(count) + 1)) - numbers):
            number = str(missing[0]).zfill(len(count))
            raise InputError(
                f"{folder / f'{start}-{number}-of-{count}.safetensors'}: this shard is missing"
                f"{f', as are {len(missing) - 1} more' if len(missing) > 1 else ''}; {DOWNLOAD_AGAIN}"
            )
