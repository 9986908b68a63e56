"""GGUF files as weights: dequantised to float32, under the names of the file."""

from pathlib import Path

import numpy as np

from farms_jax._matrices import TORCH_AXES
from farms_jax.weights.gguf_file import read_gguf, read_tensor
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
        tensors = {name: TensorInfo(_FLOAT32, tensor.shape) for name, tensor in self._file.tensors.items()}
        super().__init__(path, path.stem, "gguf", TORCH_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        return read_tensor(self._file, name)
