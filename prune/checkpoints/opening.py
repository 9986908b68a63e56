"""Open a checkpoint or a tokenizer by its path or its name on the hub."""

import re
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.programs.files import expanded
from farms_jax.weights.folders import WEIGHTS, snapshot_of

from .base import Checkpoint
from .folder import FolderCheckpoint
from .folder_tokenizer import load_tokenizer
from .gguf_checkpoint import GGUFCheckpoint
from .hub import download_model, download_tokenizer

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def open_checkpoint(model: str) -> Checkpoint:
    """Return a model, opened after a check of its headers; its weights are not read.

    `model` is a Hugging Face folder, a file of weights in one, a folder of the hub's cache, a GGUF file, or a name on
    the hub, which is downloaded: "OWNER/NAME", or "OWNER/NAME@REVISION" for another branch, tag or commit than main.

    Raises:
        InputError: There is no such model, it cannot be downloaded, or it is damaged.
    """
    path = expanded(model)
    if path.is_dir():
        folder, name = snapshot_of(path) or (path, None)
        return FolderCheckpoint(folder, name)
    if path.is_file():
        return _open_file(path)
    if match := _HUB_ID.fullmatch(model):
        return FolderCheckpoint(download_model(match["id"], match["revision"]), name=model)
    raise InputError(f"--model {model}: no such folder or file, and no hub name of the form OWNER/NAME")


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    checkpoint = FolderCheckpoint(path.parent)
    if path not in checkpoint.files:
        known = ", ".join(file.name for file in checkpoint.files)
        raise InputError(f"--model {path}: its folder's weights are {known}; name the file {WEIGHTS}, alone there")
    return checkpoint


def open_tokenizer(source: str) -> Any:
    """Load a tokenizer from a folder, a file in one or the hub ("OWNER/NAME@REVISION"); none of its code is run."""
    path = expanded(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return load_tokenizer((snapshot_of(folder) or (folder,))[0])
    if match := _HUB_ID.fullmatch(source):
        return load_tokenizer(download_tokenizer(match["id"], match["revision"]))
    raise InputError(f"--tokenizer {source}: no such folder or file, and no hub name of the form OWNER/NAME")


def choose_tokenizer(checkpoint: Checkpoint, given: str | None, *, needed: bool) -> Any:
    """Return the `given` tokenizer (see `open_tokenizer`), else the model's own if one is `needed`, else `None`."""
    if given:
        return open_tokenizer(given)
    return checkpoint.tokenizer() if needed else None
