"""Hugging Face folders: config, safetensors in one file or in shards with an index, tokenizer."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.files import atomic
from prune.checkpoints.base import WEIGHTS, Checkpoint, Shard, save_tokenizer
from prune.checkpoints.safetensors_file import Header, TensorInfo, read_header, read_tensor

INDEX = "model.safetensors.index.json"
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
        self._index = None if (path / WEIGHTS).is_file() else _read_index(path)
        filenames = [WEIGHTS] if self._index is None else sorted(set(self._index.values()))
        self.files = tuple(path / filename for filename in filenames)
        self._headers = {filename: _read_shard(path / filename) for filename in filenames}
        self._home = _home_of_each(path, self._headers, self._index)
        self.tensors = {
            name: TensorInfo(entry.dtype, entry.shape)
            for header in self._headers.values()
            for name, entry in header.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:  # noqa: D102
        if name not in self._home:
            raise self._no_tensor(name)
        filename = self._home[name]
        return read_tensor(self.path / filename, name, self._headers[filename].tensors[name])

    def shards(self) -> list[Shard]:
        """Return the folder's own layout: headers verbatim, so that an unpruned export has the same bytes."""
        return [
            Shard(
                filename,
                header.raw,
                {name: (entry.start, entry.stop) for name, entry in header.tensors.items()},
                header.size,
            )
            for filename, header in self._headers.items()
        ]

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Copy config, generation config, tokenizer files and index, byte for byte.

        Args:
            folder: made where there is none.
            tokenizer: saved instead of the checkpoint's own.
        """
        names = ["config.json", "generation_config.json", *([] if self._index is None else [INDEX])]
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


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        remedy: what to do where the file is not there.

    Returns:
        Its content.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return content


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run any code and are never "
                f"loaded. {how_to_convert(folder)}"
            )
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} is in it; give a folder with safetensors weights")
    weight_map = read_json(folder / INDEX, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: it has no weight_map; download it again")
    for name, filename in weight_map.items():
        # A name with a folder in it would make an export write outside its own.
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise InputError(f"{folder / INDEX}: {name} is in {filename!r}, no plain file name; download it again")
    return weight_map


def _read_shard(path: Path) -> Header:
    if not path.is_file():
        raise InputError(f"{path}: this shard is missing, {INDEX} names it; download it again")
    return read_header(path)


def _home_of_each(folder: Path, headers: Mapping[str, Header], index: Mapping[str, str] | None) -> dict[str, str]:
    """Map each tensor to its file, after checking that index and files agree."""
    home: dict[str, str] = {}
    for filename, header in headers.items():
        for name in header.tensors:
            if name in home:
                raise InputError(f"{folder}: {name} is in two shards, {home[name]} and {filename}; download them again")
            home[name] = filename
    if index is None:
        return home
    missing = [f"{name} (not in {filename})" for name, filename in index.items() if home.get(name) != filename]
    unlisted = [f"{name} (in {filename}, not in the index)" for name, filename in home.items() if name not in index]
    if faults := missing + unlisted:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(
            f"{folder / INDEX}: it disagrees with its shards: {', '.join(faults[:10])}{more}; download all"
        )
    return home


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

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers promises no type, and every one means the same here
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({error}); give another one with --tokenizer PATH"
        ) from error
