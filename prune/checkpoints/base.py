"""A checkpoint of any format, with the names, orientation and config of Hugging Face."""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.programs import files
from farms_jax.weights import WeightSource
from farms_jax.weights.safetensors_file import FileLayout

from ..models import Network, make_network
from .folder_tokenizer import declare_own_rule
from .names import is_beside, names_in, stored_in_out, without_others

# Before transformers is imported: without torch it would advise to install it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

GENERATION = "generation_config.json"


class Checkpoint(ABC):
    """A model to prune: its weights (linears are (out, in)), config and tokenizer, and the layout of a copy.

    Attributes:
        names: Name of each tensor -> what the file calls it; see `names_in`.
        tensors: Name -> dtype and shape, linears as (out, in).
        stored: The same with the shapes that the file has.
        turned: Names of those that it has as (in, out).
    """

    def __init__(
        self, source: WeightSource, config: Mapping[str, Any], files: tuple[Path, ...], name: str | None = None
    ) -> None:
        """Keep opened weights with their files and config."""
        self.source, self.path, self.name = source, source.path, name or source.name
        self.config, self.files = dict(config), files
        self.names = names_in(self.config, source)
        self.stored = {name: source.tensors[stored] for name, stored in self.names.items()}
        self.turned = stored_in_out(self.config, self.names)
        self.tensors = {
            name: info._replace(shape=info.shape[::-1]) if name in self.turned else info
            for name, info in self.stored.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype, a linear as (out, in); an InputError where that is impossible."""
        return self.turn(name, self.source.read(self.names.get(name, name)))

    def turn(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return a tensor as the file has it from that as it is here, or the reverse; see `Network.stored_in_out`."""
        return array.T if name in self.turned else array

    def is_weight(self, name: str) -> bool:
        """Return whether a tensor is a weight, and not a table, a mask or the like, which may hold any numbers."""
        return not is_beside(self.names.get(name, name), self.source)

    @abstractmethod
    def shards(self) -> dict[str, FileLayout]:
        """Return the layouts of an exported copy's weight files, by file name."""

    @abstractmethod
    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write all but the weights into a folder; a given tokenizer is saved instead of the checkpoint's own."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Load the tokenizer, one of `transformers`; an InputError if there is none, or it cannot be loaded."""

    def network(self) -> Network:
        """Return the config's network, after a check that the tensors are those that it needs; no weights are read."""
        weights = list(filter(self.is_weight, self.tensors))
        network = make_network(self.config, weights)
        names = without_others(network, {*weights, *(self.tensors.keys() & network.names())}, self.name)
        network.check({name: self.tensors[name].shape for name in self.tensors if name in names})
        if made := sorted(name for name in network.names() if self.names[name] not in self.source.stored):
            what = f"{len(made)} weights, such as {made[0]}, are stored as several arrays ({self.source.quantisation})"
            raise InputError(f"{self.path}: {what}, which cannot be pruned in place; take the model's float weights")
        return network

    def sha256(self) -> str:
        """Return the SHA-256 of the weight files, read one after the other in the order of their names."""
        return files.sha256(*self.files, title="hash weights")


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `generation_config.json`, as `transformers` makes it of a model's config."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    return {"_from_model_config": True, **ids}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer of `transformers` into a folder with a `config.json`, each atomically."""
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
    declare_own_rule(folder)
