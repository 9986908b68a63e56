"""A cache of results by the hash of the weights they were computed from: only what changed is measured again."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.programs.files import write_json


def default_folder() -> Path | None:
    """Return where results are kept: `$XDG_CACHE_HOME/farms_jax`, or `~/.cache/farms_jax`; `None` without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "farms_jax"
    except RuntimeError:  # a user whom the system does not know, as in a container
        warnings.warn("this user has no home folder, so results are not kept; --cache-dir names one", stacklevel=2)
        return None


def weights_key(weights: Mapping[str, np.ndarray], *settings: Any) -> str:
    """Return the SHA-256 of weights (names, shapes, dtypes, values) and of settings, by their `repr`."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in weights.items():
        digest.update(repr((name, weight.shape, str(weight.dtype))).encode())
        digest.update(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own SHA-256 as "sha256", by which `without_checksum` finds damage on the disk.

    >>> without_checksum(with_checksum({"alpha": 2.5}))
    {'alpha': 2.5}
    """
    return {**content, "sha256": _sha256(content)}


def without_checksum(content: Any) -> dict[str, Any]:
    """Return what `with_checksum` was given; a ValueError where the content is something else or was changed."""
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _sha256(rest):
        raise ValueError("its checksum is wrong")
    return rest


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


@dataclasses.dataclass
class Cache:
    """A folder of JSON objects by key; without a folder, nothing is kept.

    One that cannot be written costs a warning: results matter more than what they save the next time.
    """

    folder: Path | None
    is_writable: bool = dataclasses.field(default=True, init=False)  # as far as is known

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the object of a key; `None` where there is none, or it is damaged."""
        if self.folder is None:
            return None
        try:
            return without_checksum(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Keep an object of what JSON knows."""
        if self.folder is None or not self.is_writable:
            return
        try:
            write_json(self.folder / f"{key}.json", with_checksum(content), shared=True)
        except OSError as error:
            self.is_writable = False
            text = f"{self.folder}: results cannot be kept there ({error.strerror or error})"
            warnings.warn(f"{text}; free space, or take another folder", stacklevel=2)
