"""Open a checkpoint or a tokenizer by its path or its name on the hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.programs.files import expanded
from farms_jax.weights.folders import WEIGHTS

from .base import Checkpoint
from .folder import FolderCheckpoint, how_to_convert, load_tokenizer
from .gguf_checkpoint import GGUFCheckpoint

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "spiece.model")


def open_checkpoint(model: str) -> Checkpoint:
    """Return a model, opened after a check of its headers; its weights are not read.

    `model` is a Hugging Face folder, a safetensors file in one, a GGUF file, or a name on the hub, which is downloaded:
    "OWNER/NAME", or "OWNER/NAME@REVISION" for another branch, tag or commit than the default one.

    Raises:
        InputError: There is no such model, it cannot be downloaded, or it is damaged.
    """
    path = expanded(model)
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.is_file():
        return _open_file(path)
    if match := _HUB_ID.fullmatch(model):
        patterns = (*_TOKENIZER_PATTERNS, "*.safetensors")
        return FolderCheckpoint(_download("--model", match["id"], match["revision"], patterns), name=model)
    raise InputError(f"--model {model}: no such folder or file, and no hub name of the form OWNER/NAME")


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        checkpoint = FolderCheckpoint(path.parent)
        if path not in checkpoint.files:
            known = ", ".join(file.name for file in checkpoint.files)
            raise InputError(f"--model {path}: its folder's weights are {known}; name the file {WEIGHTS}, alone there")
        return checkpoint
    raise InputError(
        f"--model {path}: neither a .gguf nor a .safetensors file; pickled weights (.bin, .pt, .pth) are never loaded. "
        f"{how_to_convert(path.parent)}"
    )


def open_tokenizer(source: str) -> Any:
    """Load a tokenizer from a folder, a file in one or the hub ("OWNER/NAME@REVISION"); none of its code is run."""
    path = expanded(source)
    if path.exists():
        return load_tokenizer(path if path.is_dir() else path.parent)
    if match := _HUB_ID.fullmatch(source):
        return load_tokenizer(_download("--tokenizer", match["id"], match["revision"], _TOKENIZER_PATTERNS))
    raise InputError(f"--tokenizer {source}: no such folder or file, and no hub name of the form OWNER/NAME")


def choose_tokenizer(checkpoint: Checkpoint, given: str | None, *, needed: bool) -> Any:
    """Return the `given` tokenizer (see `open_tokenizer`), else the model's own if one is `needed`, else `None`."""
    if given:
        return open_tokenizer(given)
    return checkpoint.tokenizer() if needed else None


def _download(flag: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        fault, remedy = error, "accept its licence on the hub, then run `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        fault, remedy = error, "check the name; for a private model run `hf auth login` first"
    except Exception as error:  # of several network libraries
        fault, remedy = error, "check the connection, or give a path that is on this machine"
    reason = (str(fault) or type(fault).__name__).splitlines()[0]
    raise InputError(f"{flag} {repository}: no folder here, and cannot be downloaded ({reason}); {remedy}") from fault
