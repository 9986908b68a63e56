"""GGUF files as checkpoints: dequantised to float32, under Hugging Face names, with config and tokenizer made anew."""

from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.programs.files import write_json
from farms_jax.weights.gguf_file import read_gguf, read_tensor
from farms_jax.weights.gguf_names import (
    ROPE_FACTORS,
    architecture_of,
    heads_of,
    hugging_face_names,
    restore_rows,
)
from farms_jax.weights.safetensors_file import TensorInfo, make_header, parse_header
from farms_jax.weights.shards import WEIGHTS

from .base import Checkpoint, Shard, save_tokenizer
from .gguf_model import make_config
from .gguf_tokenizer import make_tokenizer

_FLOAT32 = np.dtype(np.float32)


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Args:
            path: of the file.

        Raises:
            InputError: it is damaged, of another architecture, or has tensors that no table knows.
        """
        self.path, self.name, self.files = path, path.stem, (path,)
        self._file = read_gguf(path)
        where, found = str(path), self._file.tensors
        architecture = architecture_of(self._file.metadata, where)
        self._names = hugging_face_names(architecture, found, where)
        self.tensors = {name: TensorInfo(_FLOAT32, found[source].shape) for name, source in self._names.items()}
        factors = read_tensor(self._file, ROPE_FACTORS) if ROPE_FACTORS in found else None
        shapes = {name: info.shape for name, info in self.tensors.items()}
        self.config = make_config(self._file.metadata, shapes, factors, where)
        self._heads = heads_of(architecture, self._file.metadata, shapes, where)

    def read(self, name: str) -> np.ndarray:
        """Read and dequantise one tensor, its rows in Hugging Face's order.

        Args:
            name: full Hugging Face name.

        Returns:
            float32, (out, in).
        """
        if name not in self._names:
            raise self._no_tensor(name)
        array = read_tensor(self._file, self._names[name])
        return restore_rows(array, self._heads[name]) if name in self._heads else array

    def shards(self) -> list[Shard]:
        """Return the layout of an export: one file, float32."""
        header = make_header(self.tensors, {"format": "pt"})
        size = len(header) + sum(4 * int(np.prod(info.shape)) for info in self.tensors.values())
        entries = parse_header(header, size, WEIGHTS).tensors
        return [Shard(WEIGHTS, header, {name: (entry.start, entry.stop) for name, entry in entries.items()}, size)]

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write config and tokenizer.

        Args:
            folder: made where there is none.
            tokenizer: saved instead of the file's own.
        """
        tokenizer = self.tokenizer() if tokenizer is None else tokenizer
        write_json(folder / "config.json", self.config)
        save_tokenizer(tokenizer, folder)

    def tokenizer(self) -> Any:
        """Make the tokenizer from the file's metadata.

        Returns:
            A `transformers.PreTrainedTokenizerFast`.
        """
        return make_tokenizer(read_gguf(self.path, long_arrays=True).metadata, str(self.path))
