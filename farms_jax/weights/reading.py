"""What the readers of all formats share: descriptions of tensors, raw bytes, JSON."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.sanitise import one_line

DOWNLOAD_AGAIN = "download it again"


class TensorInfo(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@contextlib.contextmanager
def os_errors_named(path: Path, what: str = "", remedy: str = "check the path and its rights") -> Generator[None]:
    """Turn an `OSError` inside the `with` block into an `InputError` that names the file.

    Args:
        path: Path of the file that is read.
        what: What is read from it, where that is not the whole file.
        remedy: What the user can do.

    Yields:
        Nothing.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{path}: {f'{what} ' if what else ''}cannot be read ({reason}); {remedy}") from error


def read_bytes(path: Path, start: int, out: np.ndarray, name: str) -> None:
    """Fill an array with bytes of a file.

    The file is read, not mapped into memory: mapped pages count as memory of the process (peak over a model of 640 MiB
    whose largest tensor has 32: 45 MiB against 656 by `safetensors.safe_open`, or 64 where it is opened for every
    tensor), and a disk that fails under a mapped page ends the process instead of raising an error.

    Args:
        path: Path of the file.
        start: Offset of the first byte.
        out: Array to fill, uint8, shape (bytes,).
        name: Name of the tensor, for messages.

    Raises:
        InputError: The file cannot be read, or ends too early.
    """
    view, done = memoryview(out.data), 0
    with os_errors_named(path, name, "check the disk"), path.open("rb", buffering=0) as file:
        file.seek(start)
        # One call reads at most 2 GiB on Linux.
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
    if done < len(view):
        raise InputError(f"{path}: ends inside {name}: truncated; {DOWNLOAD_AGAIN}")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: Path of the file.
        remedy: What the user can do where there is no such file.

    Returns:
        The object.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    with os_errors_named(path):
        if not path.exists():
            raise InputError(f"{path}: no such file; {remedy}")
        raw = path.read_bytes()
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; {DOWNLOAD_AGAIN}")
    return content
