"""GGUF files as weights: dequantised to float32, under Hugging Face names where the architecture is known."""

import contextlib
from pathlib import Path

import numpy as np

from farms_jax._axes import TORCH_AXES
from farms_jax.errors import InputError
from farms_jax.weights.gguf_file import read_gguf, read_tensor
from farms_jax.weights.gguf_names import ROPE_FACTORS, architecture_of, heads_of, hugging_face_names, restore_rows
from farms_jax.weights.safetensors_file import TensorInfo
from farms_jax.weights.source import WeightSource

_FLOAT32 = np.dtype(np.float32)


class GGUFSource(WeightSource):
    """Weights in one GGUF file, of any architecture."""

    def __init__(self, path: Path) -> None:
        """Read a file's metadata.

        Args:
            path: of the file.

        Raises:
            InputError: see `read_gguf`.
        """
        self._file = read_gguf(path)
        found = self._file.tensors
        self._names, self._heads, architecture = {name: name for name in found}, dict[str, int](), None
        with contextlib.suppress(InputError):  # another architecture: the file's own names serve
            architecture = architecture_of(self._file.metadata, str(path))
            rotary = {ROPE_FACTORS: ROPE_FACTORS} if ROPE_FACTORS in found else {}
            self._names = hugging_face_names(architecture, found, str(path)) | rotary
        shapes = {name: found[source].shape for name, source in self._names.items()}
        if architecture is not None:
            self._heads = heads_of(architecture, self._file.metadata, shapes, str(path))
        tensors = {name: TensorInfo(_FLOAT32, shape) for name, shape in shapes.items()}
        super().__init__(path, path.stem, "gguf", TORCH_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        array = read_tensor(self._file, self._names[name])
        return restore_rows(array, self._heads[name]) if name in self._heads else array
