"""Flax's msgpack files (`flax.serialization.to_bytes`): the tree is walked, arrays are read when asked for.

A file is one map of maps; its leaves are arrays (an extension of the format), numbers, text or lists. Arrays above
1 GiB are split into pieces: a map with their shape and the pieces. Only arrays are weights; all else is passed over.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax._axes import FLAX_AXES
from farms_jax.errors import InputError
from farms_jax.weights.msgpack_file import REMEDY, ArrayAt, Tree, read_tree
from farms_jax.weights.reading import TensorInfo, read_bytes
from farms_jax.weights.sanitise import is_valid_shape, printable, short_repr
from farms_jax.weights.source import WeightSource

_PIECES = "__msgpack_chunked_array__"


class _Place(NamedTuple):
    """An array in the file: what it is, and its pieces one after the other."""

    info: TensorInfo
    pieces: tuple[ArrayAt, ...]


class MsgpackSource(WeightSource):
    """Weights in a msgpack file of Flax."""

    def __init__(self, path: Path) -> None:
        """Walk the file's tree."""
        self._places = dict(_named_arrays(read_tree(path), (), str(path)))
        tensors = {name: place.info for name, place in self._places.items()}
        super().__init__(path, path.stem, "msgpack", FLAX_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        info, pieces = self._places[name]
        array, done = np.empty(info.nbytes, np.uint8), 0
        for piece in pieces:
            read_bytes(self.path, piece.start, array[done : done + piece.size], name)
            done += piece.size
        return array.view(info.dtype).reshape(info.shape)


def _named_arrays(tree: Tree, path: tuple[str, ...], where: str) -> Iterator[tuple[str, _Place]]:
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, ArrayAt):
            yield "/".join(here), _Place(value.info, (value,))
        elif isinstance(value, dict) and _PIECES in value:
            yield "/".join(here), _joined(value, f"{where}: {printable('/'.join(here))}")
        elif isinstance(value, dict):
            yield from _named_arrays(value, here, where)


def _joined(node: Mapping[str, Any], where: str) -> _Place:
    """Join the pieces of an array; an InputError where they do not fit together."""
    shape, pieces = _values_in_order(node.get("shape")), _values_in_order(node.get("chunks"))
    are_sizes = all(type(size) is int and size >= 0 for size in shape)
    if not pieces or not are_sizes or not all(isinstance(piece, ArrayAt) for piece in pieces):
        raise InputError(f"{where}: an array in pieces needs a shape and its pieces; {REMEDY}")
    dtypes = {piece.info.dtype for piece in pieces}
    found = sum(math.prod(piece.info.shape) for piece in pieces)
    fits = len(dtypes) == 1 and is_valid_shape(shape, pieces[0].info.dtype.itemsize) and found == math.prod(shape)
    if not fits:
        raise InputError(
            f"{where}: its pieces have {found} entries, its shape {short_repr(shape)} another number; {REMEDY}"
        )
    return _Place(TensorInfo(dtypes.pop(), shape), pieces)


def _values_in_order(node: Any) -> tuple[Any, ...]:
    """Return the values of a map with the keys "0", "1", ..., Flax's form of a tuple; nothing for any other value."""
    if not isinstance(node, dict) or set(node) != {str(i) for i in range(len(node))}:
        return ()
    return tuple(node[str(i)] for i in range(len(node)))
