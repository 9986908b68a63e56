"""Hugging Face folders: config, safetensors in one file or in shards with an index, tokenizer."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic
from farms_jax.weights.safetensors_file import TensorInfo, read_tensor
from farms_jax.weights.shards import INDEX, WEIGHTS, Shards, read_files, read_indexed, read_json

from ..tokenizing import check_tokenizer, tokenizer_faults
from .base import Checkpoint, Shard, save_tokenizer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_FILES = (
    *_TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: `config.json` and safetensors, in one file or in shards with an index."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open a folder.

        Args:
            path: of the folder.
            name: for people; the folder's own where not given.

        Raises:
            InputError: a file is missing or damaged, or index and shards disagree.
        """
        self.path, self.name = path, name or path.resolve().name
        self.config = read_json(path / "config.json", "give a Hugging Face model folder")
        self._shards = read_files(path, [WEIGHTS]) if (path / WEIGHTS).is_file() else _read_shards(path)
        self.files = tuple(path / filename for filename in self._shards.headers)
        self.tensors = {
            name: TensorInfo(entry.dtype, entry.shape)
            for header in self._shards.headers.values()
            for name, entry in header.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:  # noqa: D102
        headers, home = self._shards
        if name not in home:
            raise self._no_tensor(name)
        return read_tensor(self.path / home[name], name, headers[home[name]].tensors[name])

    def shards(self) -> list[Shard]:
        """Return the folder's own layout: headers verbatim, so that an unpruned export has the same bytes."""
        return [
            Shard(
                filename,
                header.raw,
                {name: (entry.start, entry.stop) for name, entry in header.tensors.items()},
                header.size,
            )
            for filename, header in self._shards.headers.items()
        ]

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Copy config, generation config, tokenizer files and index, byte for byte.

        Args:
            folder: made where there is none.
            tokenizer: saved instead of the checkpoint's own.
        """
        names = ["config.json", "generation_config.json", *([] if (self.path / WEIGHTS).is_file() else [INDEX])]
        for filename in names if tokenizer is not None else [*names, *_TOKENIZER_FILES]:
            if (self.path / filename).is_file():
                with atomic(folder / filename) as part:
                    shutil.copyfile(self.path / filename, part)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)

    def tokenizer(self) -> Any:
        """Load the folder's tokenizer; only files of the folder are read, and no code of it is run.

        Returns:
            A tokenizer of `transformers`.
        """
        return load_tokenizer(self.path)


def how_to_convert(folder: Path) -> str:
    """Return what to do with a folder of pickled weights."""
    return (
        'Convert them where torch is installed: python -c "from transformers import AutoModelForCausalLM as Model; '
        f"Model.from_pretrained('{folder}').save_pretrained('CONVERTED')\", copy the tokenizer files, "
        "and give --model CONVERTED"
    )


def _read_shards(folder: Path) -> Shards:
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run any code and are never "
                f"loaded. {how_to_convert(folder)}"
            )
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} is in it; give a folder with safetensors weights")
    return read_indexed(folder / INDEX)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder; only files of the folder are read, and no code of it is run.

    Args:
        folder: with `tokenizer.json` or the files of an older form.

    Returns:
        A tokenizer of `transformers`.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    if not any((folder / filename).is_file() for filename in _TOKENIZERS):
        raise InputError(f"{folder}: there is no tokenizer in it; give a folder that has one with --tokenizer PATH")
    # Without torch, transformers would advise to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # noqa: PLC0415

    with tokenizer_faults(f"{folder}: its tokenizer cannot be loaded", "give another one with --tokenizer PATH"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_tokenizer(tokenizer)
    return tokenizer
