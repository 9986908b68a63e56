"""Results kept by the hash of the weights they were made from, so that only what changed is measured again."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.files import write_json


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


class Cache:
    """A folder of JSON objects by key; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        """Open a cache.

        Args:
            folder: made when something is kept; `None` keeps nothing.
        """
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key; `None` where there is nothing, or it cannot be read."""
        if self.folder is None:
            return None
        try:
            content = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Keep an object of what JSON knows.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if self.folder is not None:
            write_json(self.folder / f"{key}.json", content)
