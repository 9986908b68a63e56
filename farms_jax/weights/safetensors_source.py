"""Safetensors as weights: one file, or several files of one folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from farms_jax._axes import LeafAxes
from farms_jax.errors import InputError
from farms_jax.weights.layout import layout_of
from farms_jax.weights.reading import TensorInfo, part_of
from farms_jax.weights.safetensors_file import Entry, read_layout, read_tensor
from farms_jax.weights.source import WeightSource


class SafetensorsSource(WeightSource):
    """Weights in safetensors files of one folder.

    Attributes:
        layouts: File name -> where everything is in the file.
        file_of: Tensor -> file name.
    """

    def __init__(self, path: Path, filenames: Iterable[str] = (), index: Mapping[str, str] | None = None) -> None:
        """Read the headers of a model's files in the folder `path`; or of the file `path`, without `filenames`.

        Where a tensor is in several of them, the `index` tells by tensor which file is meant.

        Raises:
            InputError: A file cannot be read, or without an index a tensor is in two.
        """
        self._folder = path if path.is_dir() else path.parent
        self.layouts = {filename: read_layout(self._folder / filename) for filename in filenames or [path.name]}
        self.file_of: dict[str, str] = {}
        for filename, layout in self.layouts.items():
            for name in layout.tensors:
                if name in self.file_of and index is None:
                    raise InputError(
                        f"{self._folder}: {name} is in two files, {self.file_of[name]} and {filename}, which are "
                        "several models; give one of them"
                    )
                if name not in self.file_of or (index or {}).get(name) == filename:
                    self.file_of[name] = filename
        tensors = {name: self.layouts[filename].tensors[name].info for name, filename in self.file_of.items()}
        metadata = {key: value for layout in self.layouts.values() for key, value in layout.metadata.items()}
        name = path.resolve().name if path == self._folder else path.stem
        super().__init__(path, name, "safetensors", lambda weights: layout_of(weights, metadata, "torch"), tensors)

    def _read(self, name: str) -> np.ndarray:
        return self._read_values(name, 0, self.stored[name].shape)

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        part = part_of(self.stored[name].shape, axes, index)
        return None if part is None else self._read_values(name, *part)

    def _read_values(self, name: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Read the part of this number and shape of a tensor."""
        filename = self.file_of[name]
        entry = self.layouts[filename].tensors[name]
        part = TensorInfo(entry.info.dtype, shape)
        start = entry.start + number * part.nbytes
        return read_tensor(self._folder / filename, name, Entry(part, start, start + part.nbytes))
