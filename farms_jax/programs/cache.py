"""Results kept by the hash of the weights they were made from, so that only what changed is measured again."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.programs.files import write_json


def default_folder() -> Path:
    """Where results are kept: `$XDG_CACHE_HOME/farms_jax`, or `~/.cache/farms_jax`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "farms_jax"


def weights_key(weights: Mapping[str, np.ndarray], *settings: Any) -> str:
    """Hash weights and whatever else the results depend on.

    >>> import numpy as np
    >>> len(weights_key({"layer": np.zeros((2, 3))}, "settings"))
    64

    Args:
        weights: by name; names, shapes, dtypes and values count.
        settings: anything whose `repr` tells it apart.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in weights.items():
        digest.update(repr((name, weight.shape, str(weight.dtype))).encode())
        digest.update(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a JSON object its own SHA-256, for `without_checksum` to find out whether it was damaged on the disk.

    >>> without_checksum(with_checksum({"alpha": 2.5}))
    {'alpha': 2.5}

    Args:
        content: of what JSON knows, with strings as keys; "sha256" is not one of them.

    Returns:
        The same and "sha256".
    """
    return {**content, "sha256": _sha256(content)}


def without_checksum(content: Any) -> dict[str, Any]:
    """Take the SHA-256 that `with_checksum` gave off a JSON object, and see that it is right.

    Args:
        content: as read from a file.

    Returns:
        What `with_checksum` was given.

    Raises:
        ValueError: it is something else, or was changed.
    """
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _sha256(rest):
        raise ValueError("it does not have its checksum")
    return rest


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


class Cache:
    """A folder of JSON objects by key; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        """Open a cache.

        Args:
            folder: made when something is kept; `None` keeps nothing.
        """
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key; `None` where there is nothing, or it is damaged."""
        if self.folder is None:
            return None
        try:
            return without_checksum(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Keep an object of what JSON knows.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self.folder / f"{key}.json"
        own = path.with_name(f"{key}.{uuid.uuid4().hex}")  # another process may be at the same result
        try:
            write_json(own, with_checksum(content))
            os.replace(own, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
