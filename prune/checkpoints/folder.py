"""Hugging Face folders: config, safetensors in one file or in shards with an index, tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic
from farms_jax.weights.folders import INDEX, WEIGHTS, open_indexed
from farms_jax.weights.reading import read_json
from farms_jax.weights.safetensors_file import FileLayout
from farms_jax.weights.safetensors_source import SafetensorsSource

from ..tokenizing import check_tokenizer, tokenizer_faults
from .base import Checkpoint, save_tokenizer

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
        """Open a folder; an InputError where a file is missing or damaged, or index and shards disagree."""
        config = read_json(path / "config.json", "give a Hugging Face model folder")
        source = _open_weights(path)
        super().__init__(source, config, tuple(path / filename for filename in source.layouts), name)
        self._layouts = source.layouts

    def shards(self) -> dict[str, FileLayout]:
        """Return the folder's own layouts, headers verbatim: an unpruned export has the same bytes."""
        return self._layouts

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Copy config, generation config, tokenizer files and index, byte for byte."""
        names = ["config.json", "generation_config.json", *([] if (self.path / WEIGHTS).is_file() else [INDEX])]
        for filename in names if tokenizer is not None else [*names, *_TOKENIZER_FILES]:
            if (self.path / filename).is_file():
                with atomic(folder / filename) as part:
                    shutil.copyfile(self.path / filename, part)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)

    def tokenizer(self) -> Any:
        """Load the folder's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.path)


def how_to_convert(folder: Path) -> str:
    """Return what the user can do with a folder of pickled weights."""
    return (
        'Convert them where torch is installed: python -c "from transformers import AutoModelForCausalLM as Model; '
        f"Model.from_pretrained('{folder}').save_pretrained('CONVERTED')\", copy the tokenizer files, "
        "and give --model CONVERTED"
    )


def _open_weights(folder: Path) -> SafetensorsSource:
    if (folder / WEIGHTS).is_file():
        return SafetensorsSource(folder, [WEIGHTS])
    if (folder / INDEX).is_file():
        return open_indexed(folder / INDEX, exact=True)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run any code and are never "
            f"loaded. {how_to_convert(folder)}"
        )
    raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} is in it; give a folder with safetensors weights")


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder; only files of the folder are read, and none of its code is run."""
    if not any((folder / filename).is_file() for filename in _TOKENIZERS):
        raise InputError(f"{folder}: there is no tokenizer in it; give a folder that has one with --tokenizer PATH")
    from transformers import AutoTokenizer  # noqa: PLC0415

    with tokenizer_faults(f"{folder}: its tokenizer cannot be loaded", "give another one with --tokenizer PATH"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_tokenizer(tokenizer)
    return tokenizer
