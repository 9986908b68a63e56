"""A checkpoint whose floating-point tensors are read, and copied, in one dtype."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from farms_jax.programs.files import write_json
from farms_jax.weights import TensorInfo
from farms_jax.weights.folders import INDEX
from farms_jax.weights.reading import read_json
from farms_jax.weights.safetensors_file import FileLayout, make_layout

from .base import Checkpoint

_FIELDS = ("dtype", "torch_dtype")  # since transformers 5, and before


class ConvertedCheckpoint(Checkpoint):
    """Another checkpoint in one dtype: float32, float16 or bfloat16; integers stay as they are."""

    def __init__(self, original: Checkpoint, dtype: np.dtype[Any]) -> None:
        """Take over all but the weights of an open checkpoint."""
        self._original, self._dtype = original, dtype
        self.source, self.path, self.name = original.source, original.path, original.name
        self.config, self.files, self.names = _with_dtype(original.config, dtype.name), original.files, original.names
        self.turned, self.stored = original.turned, original.stored
        self.tensors = {name: self._converted(info) for name, info in original.tensors.items()}

    def _converted(self, info: TensorInfo) -> TensorInfo:
        return info._replace(dtype=self._dtype) if jnp.issubdtype(info.dtype, jnp.floating) else info

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, rounded to the nearest numbers of the dtype."""
        return self._original.read(name).astype(self.tensors[name].dtype, copy=False)

    def shards(self) -> dict[str, FileLayout]:
        """Return the original's files, with the same tensors in each."""
        return {
            filename: make_layout({n: self._converted(e.info) for n, e in layout.tensors.items()}, layout.metadata)
            for filename, layout in self._original.shards().items()
        }

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write those of the original; config and index say the new dtype and size."""
        self._original.copy_sidecars(folder, tokenizer)
        write_json(folder / "config.json", self.config)
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX, "write it again")
            total = sum(info.nbytes for info in self.tensors.values())
            write_json(folder / INDEX, index | {"metadata": {**(index.get("metadata") or {}), "total_size": total}})

    def tokenizer(self) -> Any:
        """Load the original's tokenizer."""
        return self._original.tokenizer()


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config whose dtype, also in the configs inside it, is this one."""

    def changed(content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {key: dtype if key in _FIELDS else changed(value) for key, value in content.items()}

    return {**({} if set(_FIELDS) & set(config) else {"torch_dtype": dtype}), **changed(config)}
