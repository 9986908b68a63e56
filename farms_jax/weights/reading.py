"""Shared by the readers of all formats: descriptions of tensors and checks of them, raw bytes, JSON."""

import contextlib
import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax._axes import LeafAxes
from farms_jax.errors import InputError, one_line, short_repr

DOWNLOAD_AGAIN = "download it again"
_MAX_NAME = 500  # characters; GGUF allows 64, nested optimiser states have 200
_MAX_AXES = 64  # numpy's
_MAX_BYTES = 2**63


class TensorInfo(NamedTuple):
    """A tensor without its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_name(name: str, where: str) -> None:
    """Refuse a tensor's name that tables and messages cannot show; `where` names the file."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise InputError(
            f"{where}: a tensor is called {short_repr(name)}, which is no name (printable, at most {_MAX_NAME} "
            "characters); download or write it again"
        )


def is_valid_shape(shape: Sequence[int], itemsize: int) -> bool:
    """Return whether an array can have a shape on any machine; the limits hold for empty arrays too."""
    if len(shape) > _MAX_AXES or any(size >= _MAX_BYTES for size in shape):
        return False
    return math.prod(size for size in shape if size) * itemsize < _MAX_BYTES


@contextlib.contextmanager
def os_errors_named(path: Path, what: str = "", remedy: str = "check the path and its rights") -> Generator[None]:
    """Turn an `OSError` in the `with` block into an `InputError` that names the file, and `what` is read from it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        where = error.filename or path
        raise InputError(f"{where}: {f'{what} ' if what else ''}cannot be read ({reason}); {remedy}") from error


def read_bytes(path: Path, start: int, out: np.ndarray, name: str) -> None:
    """Fill `out`, uint8 (bytes,), from byte `start` of a file on; `name` is the tensor's, for the error message.

    The file is read, not mapped into memory: mapped pages count as memory of the process (peak over a model of 640 MiB
    whose largest tensor has 32: 45 MiB against 656 by `safetensors.safe_open`, or 64 where it is opened for every
    tensor), and a disk that fails under a mapped page ends the process instead of raising an error.

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


def part_of(shape: Sequence[int], axes: LeafAxes, index: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """Return which part of a tensor's values a layer of its stack is, and the layer's shape.

    `None` where the layer is no part of one piece, that is where the stack is not the first axes.

    >>> part_of((2, 3, 4), LeafAxes((1,), (2,), stack=(0,)), (1,))
    (1, (3, 4))
    """
    count = len(axes.stack)
    if sorted(axes.stack) != list(range(count)):
        return None
    place = dict(zip(axes.stack, index, strict=True))
    return int(np.ravel_multi_index([place[axis] for axis in range(count)], shape[:count])), tuple(shape[count:])


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; `remedy` is what the user can do if the file does not exist."""
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
