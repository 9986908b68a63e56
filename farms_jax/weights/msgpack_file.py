"""The msgpack format, as far as Flax uses it: maps, text, numbers, and arrays as an extension of it.

The format's own package would bring every array into memory; here they are passed over, and their places kept.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.cursor import Cursor
from farms_jax.weights.sanitise import is_valid_shape, one_line, short_repr

_REMEDY = "write it again with flax.serialization.to_bytes"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's extensions
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(enumerate("fdBHIQbhiq", start=0xCA))  # in the words of `struct`, as those of lengths below
_TEXT = dict(enumerate("BHI", start=0xD9))
_BYTES = dict(enumerate("BHI", start=0xC4))
_LIST = dict(enumerate("HI", start=0xDC))
_MAP = dict(enumerate("HI", start=0xDE))
_EXTENSION = dict(enumerate("BHI", start=0xC7))
_FIXED_EXTENSION = dict(enumerate((1, 2, 4, 8, 16), start=0xD4))  # bytes
_DEEPEST = 100  # maps in maps

Tree = dict[str, Any]


class ArrayAt(NamedTuple):
    """An array in the file: what it is, and where its bytes are.

    Attributes:
        dtype: of its entries.
        shape: of the array.
        start: first byte in the file.
        size: in bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    size: int


def read_tree(path: Path) -> Tree:
    """Read the tree of a file, without its arrays' entries.

    Args:
        path: of the file.

    Returns:
        Nested dict; its leaves are `ArrayAt`, numbers, text, lists, `None` (also for bytes and complex numbers).

    Raises:
        InputError: the file is damaged or truncated, or holds what Flax does not write.
    """
    try:
        with path.open("rb") as file:
            walker = _Walker(file, path)
            tree = walker.value()
            if not isinstance(tree, dict):
                raise InputError(f"{path}: no msgpack file of Flax (it does not start with a map); {_REMEDY}")
            if rest := walker.size - file.tell():
                raise InputError(f"{path}: {rest} bytes after its tree belong to nothing; {_REMEDY}")
            return tree
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a text in it is damaged ({one_line(error)}); {_REMEDY}") from error


class _Walker(Cursor):
    """Reads values one after the other, and passes over arrays."""

    order, content, remedy, depth = ">", "tree", _REMEDY, 0

    def value(self) -> Any:
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:  # small numbers, positive and negative
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first < 0x90 or first in _MAP:
            return self.map(self.length(first, 0x80, _MAP))
        if first < 0xA0 or first in _LIST:
            return self.list(self.length(first, 0x90, _LIST))
        if first < 0xC0 or first in _TEXT:
            return self.take(self.length(first, 0xA0, _TEXT)).decode()
        if first in _BYTES:
            return self.skip(self.number(_BYTES[first]))
        if first in _FIXED_EXTENSION:
            return self.extension(_FIXED_EXTENSION[first])
        if first in _EXTENSION:
            return self.extension(self.number(_EXTENSION[first]))
        raise InputError(f"{self.path}: byte {first:#x} starts no value of msgpack: damaged; {_REMEDY}")

    def length(self, first: int, zero: int, long: Mapping[int, str]) -> int:
        """Length of a value: of a short one its first byte's distance from `zero`, else a number of its own."""
        return self.number(long[first]) if first in long else first - zero

    def map(self, count: int) -> Tree:
        tree: Tree = {}
        self.enter()
        for _ in range(count):
            key = self.value()
            if not isinstance(key, str) or key in tree:
                raise InputError(f"{self.path}: key {short_repr(key)} of a map is no text, or there twice; {_REMEDY}")
            tree[key] = self.value()
        self.depth -= 1
        return tree

    def list(self, count: int) -> list[Any]:
        self.enter()
        items = [self.value() for _ in range(count)]
        self.depth -= 1
        return items

    def enter(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise InputError(f"{self.path}: more than {_DEEPEST} maps in maps: damaged; {_REMEDY}")

    def extension(self, size: int) -> Any:
        code = self.number("b")
        if code not in {_ARRAY, _COMPLEX, _SCALAR}:
            raise InputError(f"{self.path}: extension {code} of msgpack is none of Flax's; {_REMEDY}")
        if code == _COMPLEX:
            return self.skip(size)
        array = self.array(self.file.tell() + size)
        self.skip(array.size)
        return array

    def array(self, end: int) -> ArrayAt:
        """Read what the array is that ends at byte `end` of the file, up to its entries."""
        if self.take(1) != b"\x93":
            raise self.damaged("is not (shape, dtype, bytes)")
        shape, name, kind = self.value(), self.value(), self.take(1)[0]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise self.damaged(f"has the shape {short_repr(shape)}")
        if kind not in _BYTES:
            raise self.damaged("has no bytes")
        size, start, dtype = self.number(_BYTES[kind]), self.file.tell(), self.dtype(name)
        fits = is_valid_shape(shape, dtype.itemsize) and math.prod(shape) * dtype.itemsize == size
        if start + size != end or not fits:
            raise self.damaged(f"of shape {short_repr(tuple(shape))} and {dtype} has {size} bytes")
        return ArrayAt(dtype, tuple(shape), start, size)

    def dtype(self, name: Any) -> np.dtype[Any]:
        fault = self.damaged(f"has the dtype {short_repr(name)}, which is no kind of number")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z]\w*", name):
            raise fault
        try:
            dtype = np.dtype(getattr(ml_dtypes, name, name))
        except TypeError as error:
            raise fault from error
        if dtype.hasobject or dtype.itemsize == 0:
            raise fault
        return dtype

    def damaged(self, fault: str) -> InputError:
        return InputError(f"{self.path}: the array at byte {self.file.tell()} {fault}; {_REMEDY}")
