"""Flax's msgpack files (`flax.serialization.to_bytes`): the tree is walked, arrays are read when asked for.

A file is one map of maps; its leaves are arrays (an extension of the format), numbers, text or lists. Arrays above
1 GiB are split into pieces: a map with their shape and the pieces. Only arrays are weights; all else is passed over.

The `msgpack` package reads all but the arrays, which are skipped by their length: the package would load each array
to pass over it (80 MiB and 0.4 s instead of nothing and 0.01 s for a file of 192 MiB whose largest array has 32).
"""

import contextlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax._axes import LeafAxes
from farms_jax._extras import from_extra
from farms_jax.errors import InputError, one_line, printable, short_repr
from farms_jax.weights.layout import layout_of
from farms_jax.weights.reading import TensorInfo, is_valid_shape, os_errors_named, part_of, read_bytes
from farms_jax.weights.source import WeightSource

_REMEDY = "write it again with flax.serialization.to_bytes"
_PIECES = "__msgpack_chunked_array__"
# First bytes of values. Short maps have their length in the first byte.
_MAPS = {*range(0x80, 0x90), 0xDE, 0xDF}
_EXTENSIONS = {0xC7: ">xBb", 0xC8: ">xHb", 0xC9: ">xIb", **dict.fromkeys(range(0xD4, 0xD9), ">xb")}
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # codes of Flax's extensions
_BYTES_HEADERS = (2, 3, 5)  # possible sizes of the type and the length before a value of bytes
_MAX_DEPTH = 100  # maps in maps
_HEAD = 2048  # bytes; more than an array's shape and dtype take


class _ArrayAt(NamedTuple):
    """An array and its bytes in the file."""

    info: TensorInfo
    pieces: tuple[tuple[int, int], ...]  # (first byte, size)


class MsgpackSource(WeightSource):
    """Weights in a msgpack file of Flax."""

    def __init__(self, path: Path) -> None:
        """Walk the file's tree."""
        self._arrays = dict(_named_arrays(_read_tree(path), "", str(path)))
        tensors = {name: array.info for name, array in self._arrays.items()}
        super().__init__(path, path.stem, "msgpack", lambda weights: layout_of(weights, {}, "flax"), tensors)

    def _read(self, name: str) -> np.ndarray:
        return self._read_values(name, 0, self.stored[name].shape)

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        part = part_of(self.stored[name].shape, axes, index)
        return None if part is None else self._read_values(name, *part)

    def _read_values(self, name: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Read the part of this number and shape of an array."""
        info, pieces = self._arrays[name]
        part = TensorInfo(info.dtype, shape)
        array, done, skip = np.empty(part.nbytes, np.uint8), 0, number * part.nbytes
        for start, size in pieces:
            count = min(max(size - skip, 0), part.nbytes - done)
            read_bytes(self.path, start + skip, array[done : done + count], name)
            done, skip = done + count, max(skip - size, 0)
        return array.view(info.dtype).reshape(shape)


def _named_arrays(tree: Mapping[str, Any], prefix: str, where: str) -> Iterator[tuple[str, _ArrayAt]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, _ArrayAt):
            yield name, value
        elif isinstance(value, dict) and _PIECES in value:
            yield name, _joined(value, f"{where}: {printable(name)}")
        elif isinstance(value, dict):
            yield from _named_arrays(value, f"{name}/", where)


def _joined(node: Mapping[str, Any], where: str) -> _ArrayAt:
    """Join the pieces of an array; an InputError where they do not fit together."""
    shape, pieces = _values_in_order(node.get("shape")), _values_in_order(node.get("chunks"))
    are_sizes = all(type(size) is int and size >= 0 for size in shape)
    if not pieces or not are_sizes or not all(isinstance(piece, _ArrayAt) for piece in pieces):
        raise InputError(f"{where}: an array in pieces needs a shape and its pieces; {_REMEDY}")
    dtypes = {piece.info.dtype for piece in pieces}
    found = sum(math.prod(piece.info.shape) for piece in pieces)
    fits = len(dtypes) == 1 and is_valid_shape(shape, pieces[0].info.dtype.itemsize) and found == math.prod(shape)
    if not fits:
        raise InputError(
            f"{where}: its pieces have {found} entries, its shape {short_repr(shape)} another number; {_REMEDY}"
        )
    return _ArrayAt(TensorInfo(dtypes.pop(), shape), tuple(piece.pieces[0] for piece in pieces))


def _values_in_order(node: Any) -> tuple[Any, ...]:
    """Return the values of a map with the keys "0", "1", ..., Flax's form of a tuple; nothing for any other value."""
    if not isinstance(node, dict) or set(node) != {str(i) for i in range(len(node))}:
        return ()
    return tuple(node[str(i)] for i in range(len(node)))


def _read_tree(path: Path) -> dict[str, Any]:
    """Read a file's tree into nested dicts; its leaves are `_ArrayAt`, or whatever else was written."""
    with from_extra("diagnose", f"{path}: a msgpack file"):
        import msgpack
    with os_errors_named(path), path.open("rb") as file:
        reader = _Reader(msgpack.Unpacker, file, path)
        try:
            tree = reader.value()
        except (EOFError, struct.error, msgpack.exceptions.OutOfData) as error:
            raise InputError(f"{path}: ends inside its tree: truncated; {_REMEDY}") from error
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise InputError(f"{path}: damaged at byte {reader.position} ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: no msgpack file of Flax (it does not start with a map); {_REMEDY}")
    if rest := reader.size - reader.position:
        raise InputError(f"{path}: {rest} bytes after its tree belong to nothing; {_REMEDY}")
    return tree


class _Reader:
    """Reads values one after the other, and skips the bytes of arrays."""

    def __init__(self, unpacker: Any, file: IO[bytes], path: Path) -> None:
        self._unpacker, self._file, self.size = unpacker, file, path.stat().st_size
        self.position = 0  # of the next value in the file

    def _peek(self, position: int, count: int) -> bytes:
        self._file.seek(position)
        return self._file.read(count)

    def _unpack(self, method: str) -> Any:
        """Read the next value by a method of the package's unpacker."""
        self._file.seek(self.position)
        unpacker = self._unpacker(self._file, read_size=_HEAD, max_buffer_size=max(_HEAD, self.size))
        value = getattr(unpacker, method)()
        self.position += unpacker.tell()
        return value

    def value(self, depth: int = 0) -> Any:
        first = self._peek(self.position, 1)
        if first and first[0] in _EXTENSIONS:
            return self._extension(first[0])
        return self._map(depth + 1) if first and first[0] in _MAPS else self._unpack("unpack")

    def _map(self, depth: int) -> dict[str, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} maps in maps")
        tree: dict[str, Any] = {}
        for _ in range(self._unpack("read_map_header")):
            key = self._unpack("unpack")
            if not isinstance(key, str) or key in tree:
                raise ValueError(f"key {short_repr(key)} of a map is no text, or there twice")
            tree[key] = self.value(depth)
        return tree

    def _extension(self, first: int) -> _ArrayAt | None:
        head = self._peek(self.position, struct.calcsize(_EXTENSIONS[first]))
        *length, code = struct.unpack(_EXTENSIONS[first], head)
        start = self.position + len(head)
        end = start + (length[0] if length else 1 << (first - 0xD4))
        if code not in {_ARRAY, _COMPLEX, _SCALAR}:
            raise ValueError(f"extension {code} of msgpack is none of Flax's")
        if end > self.size:
            raise EOFError
        array = None if code == _COMPLEX else self._array(start, end)
        self.position = end  # past the bytes, without reading them
        return array

    def _array(self, start: int, end: int) -> _ArrayAt:
        """Read the shape and dtype of (shape, dtype, bytes), which lies between two offsets of the file."""
        unpacker = self._unpacker(max_buffer_size=_HEAD)
        unpacker.feed(self._peek(start, min(_HEAD, end - start)))
        if unpacker.read_array_header() != 3:
            raise ValueError("an array is not (shape, dtype, bytes)")
        shape, name = unpacker.unpack(), unpacker.unpack()
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an array has the shape {short_repr(shape)}")
        info = TensorInfo(_dtype(name), tuple(shape))
        header = end - start - unpacker.tell() - info.nbytes
        if not is_valid_shape(shape, info.dtype.itemsize) or header not in _BYTES_HEADERS:
            raise ValueError(
                f"an array of shape {short_repr(info.shape)} and {info.dtype} has {end - start} bytes with its shape"
            )
        return _ArrayAt(info, ((end - info.nbytes, info.nbytes),))


def _dtype(name: Any) -> np.dtype[Any]:
    dtype = None
    if isinstance(name, str) and re.fullmatch(r"[a-z]\w*", name):
        with contextlib.suppress(TypeError):
            dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype is None or dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array has the dtype {short_repr(name)}, which is no kind of number")
    return dtype
