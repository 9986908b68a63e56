"""The npy format of numpy: a header checked before anything is read, and nothing is ever unpickled.

`numpy.load` believes a header: it takes memory for whatever shape is there, and fails in a dozen ways on a damaged one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from farms_jax.errors import InputError
from farms_jax.weights.sanitise import is_valid_shape, one_line, printable, short_repr

_REMEDY = "write it again with numpy.save or numpy.savez"
_PIECE = 1 << 18  # bytes; a zip archive gives what is asked for in one copy more
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NpyHeader(NamedTuple):
    """What an array is, as its header says.

    Attributes:
        dtype: of its entries.
        shape: of the array.
        fortran: whether the first axis runs fastest in the file.
        start: first byte of the entries in the stream.
        size: of the entries in bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    size: int


def read_npy_header(stream: IO[bytes], where: str) -> NpyHeader:
    """Read a header, up to the entries.

    Args:
        stream: at the first byte of the format.
        where: name of the file, for messages.

    Returns:
        The header, of a dtype and a shape that an array can have.

    Raises:
        InputError: it is damaged, or the entries are Python objects.
    """
    try:
        version = npy.read_magic(stream)
    except ValueError as error:
        raise InputError(f"{where}: damaged, or no array of numpy ({one_line(error)}); {_REMEDY}") from error
    if version not in _READERS:
        raise InputError(f"{where}: version {version} of the npy format holds no plain numbers; {_REMEDY}")
    try:
        shape, fortran, dtype = _READERS[version](stream)
    except Exception as error:  # of any kind: a header is an expression of Python, taken apart by Python's own parser
        raise InputError(f"{where}: its header is damaged ({one_line(error)}); {_REMEDY}") from error
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, that is pickles, which are never loaded; save numbers instead")
    # type(), not isinstance(): True is an int to Python.
    sizes: Sequence[Any] = shape
    if not all(type(size) is int and size >= 0 for size in sizes) or not is_valid_shape(shape, max(1, dtype.itemsize)):
        raise InputError(
            f"{where}: there can be no array of shape {short_repr(shape)} and {printable(str(dtype))}; {_REMEDY}"
        )
    if dtype.itemsize == 0 or dtype.shape:
        raise InputError(f"{where}: its entries are {printable(str(dtype))}, no plain numbers; {_REMEDY}")
    return NpyHeader(dtype, shape, fortran, stream.tell(), math.prod(shape) * dtype.itemsize)


def read_npy_entries(stream: IO[bytes], header: NpyHeader, where: str) -> np.ndarray:
    """Read the entries that follow a header; there must be as many, or the caller has made sure of it.

    Args:
        stream: where the entries begin.
        header: of `read_npy_header`.
        where: name of the file, for messages.

    Returns:
        The array.

    Raises:
        InputError: the stream ends too early.
    """
    array, done = np.empty(header.size, np.uint8), 0
    view = memoryview(array.data)
    while piece := stream.read(min(_PIECE, header.size - done)):
        view[done : done + len(piece)] = piece
        done += len(piece)
    if done < header.size:
        raise InputError(f"{where}: ends inside the array: truncated; {_REMEDY}")
    return array.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")


def read_npy(path: Path) -> np.ndarray:
    """Read a file of one array.

    Args:
        path: of the file.

    Returns:
        The array.

    Raises:
        InputError: it is damaged, holds Python objects, or has other bytes than its shape needs.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header, size = read_npy_header(file, str(path)), path.stat().st_size
        if header.start + header.size != size:
            raise InputError(
                f"{path}: shape {short_repr(header.shape)} of {printable(str(header.dtype))} needs {header.size} "
                f"bytes, the file gives {size - header.start}; {_REMEDY}"
            )
        return read_npy_entries(file, header, str(path))
