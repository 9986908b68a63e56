"""GGUF files as checkpoints: dequantised to float32, under Hugging Face names, with config and tokenizer made anew."""

from pathlib import Path
from typing import Any

from farms_jax.programs.files import write_json
from farms_jax.weights.gguf_file import read_gguf
from farms_jax.weights.gguf_source import ROPE_FACTORS, GGUFSource
from farms_jax.weights.safetensors_file import FileLayout, make_layout
from farms_jax.weights.safetensors_source import WEIGHTS

from .base import Checkpoint, save_tokenizer
from .gguf_model import make_config
from .gguf_tokenizer import make_tokenizer


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Open a file; an InputError where it is damaged, or has an architecture or tensors that are not known."""
        source = GGUFSource(path, strict=True)
        # The rotary factors are part of the config, not of the network.
        tensors = {name: info for name, info in source.tensors.items() if name != ROPE_FACTORS}
        factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in source.tensors else None
        shapes = {name: info.shape for name, info in tensors.items()}
        config = make_config(source.metadata, shapes, factors, str(path))
        super().__init__(source, config, tensors, (path,))

    def shards(self) -> dict[str, FileLayout]:
        """Return the layout of an export: one file, float32."""
        return {WEIGHTS: make_layout(self.tensors, {"format": "pt"})}

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write config and tokenizer, both made from the metadata."""
        tokenizer = self.tokenizer() if tokenizer is None else tokenizer
        write_json(folder / "config.json", self.config)
        save_tokenizer(tokenizer, folder)

    def tokenizer(self) -> Any:
        """Make the tokenizer, a `PreTrainedTokenizerFast`, from the file's metadata."""
        return make_tokenizer(read_gguf(self.path, long_arrays=True).metadata, str(self.path))
