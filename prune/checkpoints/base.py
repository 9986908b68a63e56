"""What a checkpoint is, whatever its format: names, orientation and config are those of Hugging Face."""

import hashlib
import tempfile
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic
from farms_jax.weights.safetensors_file import TensorInfo

from ..models import Network, make_network

_PIECE = 1 << 24  # bytes read at a time for the hash


class Shard(NamedTuple):
    """A weight file as an exported copy will have it.

    Attributes:
        filename: inside the folder.
        header: first bytes of the file, up to the tensors.
        tensors: name -> (start, stop) in bytes of the whole file.
        size: of the file in bytes.
    """

    filename: str
    header: bytes
    tensors: dict[str, tuple[int, int]]
    size: int


class Checkpoint(ABC):
    """A model on disk, read one tensor at a time.

    Attributes:
        name: for people and run directories.
        path: of the folder or the file.
        config: content of `config.json`.
        tensors: full tensor name -> its dtype and shape, (out, in) for linears.
        files: the weight files.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: full name, a key of `tensors`.

        Returns:
            Array of the stored dtype and shape.

        Raises:
            InputError: there is no such tensor, or its file cannot be read.
        """

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return how an exported copy is laid out, file by file."""

    @abstractmethod
    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write everything but the weights into an export folder.

        Args:
            folder: made where there is none.
            tokenizer: saved instead of the checkpoint's own.

        Raises:
            InputError: the checkpoint's tokenizer cannot be made; never with one given.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """Load the tokenizer, one of `transformers`.

        Raises:
            InputError: there is none, or it cannot be loaded.
        """

    def network(self) -> Network:
        """Make the network of the config, and check that the tensors are those that it needs.

        Returns:
            The network; no weights are read.

        Raises:
            InputError: the config is not supported, or tensors are unknown, missing or of another shape.
        """
        network = make_network(self.config, self.tensors)
        network.check({name: info.shape for name, info in self.tensors.items()})
        return network

    def sha256(self) -> str:
        """Return the SHA-256 of the weight files, read one after the other in the order of their names."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest, total = hashlib.sha256(), sum(path.stat().st_size for path in self.files)
        with tqdm(total=total, desc="hash weights", unit="B", unit_scale=True, leave=False) as bar:
            for path in self.files:
                with path.open("rb", buffering=0) as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
                        bar.update(len(piece))
        return digest.hexdigest()

    def _no_tensor(self, name: str) -> InputError:
        return InputError(f"{self.path}: there is no tensor {name} among its {len(self.tensors)}; check the family")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files into a folder, each whole or not at all."""
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
            with atomic(folder / path.name) as part:
                path.rename(part)
