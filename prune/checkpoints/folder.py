"""Hugging Face folders: config, weights in one file or in shards, tokenizer."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError, LeftOutWarning, listed
from farms_jax.programs.files import atomic, write_json
from farms_jax.weights import TensorInfo, WeightSource, is_lora
from farms_jax.weights.folders import INDEX, WEIGHTS, open_safetensors_folder, read_weight_map
from farms_jax.weights.lora import no_model
from farms_jax.weights.reading import read_json
from farms_jax.weights.safetensors_file import FileLayout, make_layout
from farms_jax.weights.safetensors_source import SafetensorsSource
from farms_jax.weights.torch_folder import model_in
from farms_jax.weights.torch_source import open_torch

from .base import GENERATION, Checkpoint, generation_config, save_tokenizer
from .folder_tokenizer import TOKENIZERS, declare_own_rule, load_tokenizer

CONFIG = "config.json"
_SHARD_BYTES = 5 * 10**9
_TOKENIZER_FILES = (
    *TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: `config.json`, and safetensors or files of Torch, in one file or in shards."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open a folder; an InputError where a file is missing or damaged, or its weights cannot be read."""
        if is_lora(path):
            raise InputError(no_model(path))
        config, (source, filenames) = read_json(path / CONFIG, "give a Hugging Face model folder"), _open_weights(path)
        super().__init__(source, config, tuple(path / file for file in filenames), name or path.resolve().name)
        self.path = path
        self._layouts = self._make_layouts()

    def _make_layouts(self) -> dict[str, FileLayout]:
        if not isinstance(self.source, SafetensorsSource):
            return _in_shards(self.stored)
        names: dict[str, dict[str, str]] = {}  # file -> name of a tensor in it -> name in the copy
        for name, stored in self.names.items():
            names.setdefault(self.source.file_of[stored], {})[stored] = name
        return {
            filename: layout
            if names[filename] == {name: name for name in layout.tensors}
            else make_layout({names[filename][n]: self.source.stored[n] for n in names[filename]}, layout.metadata)
            for filename, layout in self.source.layouts.items()
            if filename in names
        }

    def shards(self) -> dict[str, FileLayout]:
        """Return the layouts of a copy's files.

        They are the folder's own, headers verbatim, so that an unpruned export has the same bytes; made anew for files
        of Torch, and for those whose tensors have other names or are in another file too.
        """
        return self._layouts

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Copy config, generation config and tokenizer files byte for byte, and the index where the shards agree.

        A generation config that is not there is made from the config. The config of the tokenizer names another class
        where `AutoTokenizer` would give other tokens by it.
        """
        names = (CONFIG, GENERATION, *(() if tokenizer is not None else _TOKENIZER_FILES))
        for filename in names:
            self._copy(filename, folder)
        if not (self.path / GENERATION).is_file():
            write_json(folder / GENERATION, generation_config(self.config))
        self._write_index(folder)
        if tokenizer is None:
            declare_own_rule(folder)
        else:
            save_tokenizer(tokenizer, folder)

    def _copy(self, filename: str, folder: Path) -> None:
        if (self.path / filename).is_file():
            with atomic(folder / filename) as part:
                shutil.copyfile(self.path / filename, part)

    def _write_index(self, folder: Path) -> None:
        weight_map = {name: filename for filename, layout in self._layouts.items() for name in layout.tensors}
        if list(self._layouts) == [WEIGHTS]:
            return
        if (self.path / INDEX).is_file() and read_weight_map(self.path / INDEX) == weight_map:
            self._copy(INDEX, folder)
            return
        total = sum(self.tensors[name].nbytes for name in weight_map)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def tokenizer(self) -> Any:
        """Load the folder's tokenizer, by the rule of its `tokenizer.json`; see `load_tokenizer`."""
        return load_tokenizer(self.path)


def _open_weights(folder: Path) -> tuple[WeightSource, list[str]]:
    """Open the weights of a folder, as `transformers` would choose them: of Torch's files only without safetensors.

    Returns:
        The weights, and the names of their files.

    Raises:
        InputError: There are none, several models, or a file that is damaged or missing.
    """
    filenames = sorted(child.name for child in folder.iterdir())
    with warnings.catch_warnings():
        # Of tensors that an index names and no shard has: one that is needed is found missing later.
        warnings.simplefilter("ignore", LeftOutWarning)
        source = open_safetensors_folder(folder, filenames)
    if source is not None:
        return source, list(source.layouts)
    if files := model_in(folder, filenames):
        return open_torch(*(folder / name for name in files)), files
    others = f"; it has {listed(filenames, 8, ', ')}" if filenames else ""
    raise InputError(
        f"{folder}: neither {WEIGHTS} nor {INDEX} is in it, nor a file of Torch{others}; give a folder with a model"
    )


def _in_shards(tensors: Mapping[str, TensorInfo]) -> dict[str, FileLayout]:
    """Return the layouts of new files: one, or several of at most 5 GB, as `transformers` calls them."""
    parts: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if parts[-1] and sum(other.nbytes for other in parts[-1].values()) + info.nbytes > _SHARD_BYTES:
            parts.append({})
        parts[-1][name] = info
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = [WEIGHTS] if len(parts) == 1 else names
    return {name: make_layout(part, {"format": "pt"}) for name, part in zip(names, parts, strict=True)}
