"""GGUF files as weights: dequantised to float32, under Hugging Face names where the architecture is known."""

from pathlib import Path

import numpy as np

from farms_jax._axes import TORCH_AXES
from farms_jax.errors import InputError
from farms_jax.weights.gguf_file import read_gguf, read_tensor
from farms_jax.weights.gguf_names import ROPE_FACTORS, architecture_of, heads_of, hugging_face_names, restore_rows
from farms_jax.weights.reading import TensorInfo
from farms_jax.weights.source import WeightSource

_FLOAT32 = np.dtype(np.float32)


class GGUFSource(WeightSource):
    """Weights in one GGUF file, of any architecture; `metadata` lacks long arrays."""

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        """Read the metadata; where a tensor has no Hugging Face name, all keep theirs, or an error if `strict`."""
        self._file = read_gguf(path)
        self.metadata, found, where = self._file.metadata, self._file.tensors, str(path)
        architecture = ""
        try:
            architecture = architecture_of(self.metadata, where)
            rotary = {ROPE_FACTORS: ROPE_FACTORS} if ROPE_FACTORS in found else {}
            self._names = hugging_face_names(architecture, found, where) | rotary
        except InputError:
            if strict:
                raise
            self._names = {name: name for name in found}
        shapes = {name: found[own_name].shape for name, own_name in self._names.items()}
        self._heads = heads_of(architecture, self.metadata, shapes, where)
        tensors = {name: TensorInfo(_FLOAT32, shape) for name, shape in shapes.items()}
        super().__init__(path, path.stem, "gguf", TORCH_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        array = read_tensor(self._file, self._names[name])
        return restore_rows(array, self._heads[name]) if name in self._heads else array
