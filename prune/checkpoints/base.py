"""What a checkpoint is, whatever its format: names, orientation and config are those of Hugging Face."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.programs import files
from farms_jax.weights import TensorInfo, WeightSource
from farms_jax.weights.safetensors_file import FileLayout

from ..models import Network, make_network


class Checkpoint(ABC):
    """A model to prune: its weights, config and tokenizer, and how a copy of it is laid out.

    Attributes:
        source: The weights.
        name: Name for people and run directories.
        path: Path of the folder or the file.
        config: Content of `config.json`.
        tensors: Full tensor name -> its dtype and shape, (out, in) for linears.
        files: Paths of the weight files, in the order of their names.
    """

    def __init__(
        self,
        source: WeightSource,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        paths: tuple[Path, ...],
        name: str | None = None,
    ) -> None:
        """Put a checkpoint together.

        Args:
            source: See the class.
            config: See the class.
            tensors: See the class; those of the source that belong to the model.
            paths: Paths of the weight files.
            name: See the class; default: that of the source.
        """
        self.source, self.path, self.name = source, source.path, name or source.name
        self.config, self.tensors, self.files = dict(config), dict(tensors), paths

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: Full name, a key of `tensors`.

        Returns:
            Array of the stored dtype and shape.

        Raises:
            InputError: There is no such tensor, or its file cannot be read.
        """
        return self.source.read(name)

    @abstractmethod
    def shards(self) -> dict[str, FileLayout]:
        """Return how an exported copy is laid out: file name -> layout."""

    @abstractmethod
    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write everything but the weights into an export folder.

        Args:
            folder: Folder of the export, made where there is none.
            tokenizer: Tokenizer to save instead of the checkpoint's own.

        Raises:
            InputError: The checkpoint's tokenizer cannot be made; never with one given.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """Load the tokenizer, one of `transformers`.

        Raises:
            InputError: There is none, or it cannot be loaded.
        """

    def network(self) -> Network:
        """Make the network of the config, and check that the tensors are those that it needs.

        Returns:
            The network; no weights are read.

        Raises:
            InputError: The config is not supported, or tensors are unknown, missing or of another shape.
        """
        network = make_network(self.config, self.tensors)
        network.check({name: info.shape for name, info in self.tensors.items()})
        return network

    def sha256(self) -> str:
        """Return the SHA-256 of the weight files, read one after the other in the order of their names."""
        return files.sha256(*self.files, title="hash weights")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files into a folder, each in one step.

    Args:
        tokenizer: A tokenizer of `transformers`.
        folder: Folder, made where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        tokenizer.save_pretrained(draft)
        config = Path(draft) / "tokenizer_config.json"
        # The class's name since transformers 5; earlier ones know it, as later ones do, by the older name only.
        config.write_text(
            config.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'),
            encoding="utf-8",
        )
        for path in sorted(Path(draft).iterdir()):
            with files.atomic(folder / path.name) as part:
                path.rename(part)
