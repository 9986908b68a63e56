"""Archives of numpy arrays (`numpy.savez`), read member by member; nothing is ever unpickled."""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from farms_jax._axes import FLAX_AXES
from farms_jax.errors import InputError
from farms_jax.weights.npy_file import NpyHeader, read_npy_entries, read_npy_header
from farms_jax.weights.safetensors_file import TensorInfo
from farms_jax.weights.sanitise import one_line, printable, short_repr
from farms_jax.weights.source import WeightSource

_REMEDY = "write it again with numpy.savez"
# What reading a damaged archive comes to: NotImplementedError for a method, RuntimeError for a password.
_DAMAGED = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_DAMAGED += (struct.error, OverflowError)  # for a place in the archive
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # of numpy; others have no bound on what they grow to
_MOST_DEFLATED = 1032  # bytes that one byte of a deflated stream can stand for
_LISTED = 12  # arrays that an error names
_SLACK = 1 << 16  # bytes; for streams too short for that bound to mean anything


class NpzSource(WeightSource):
    """Weights in an `.npz` archive; names of members are names of tensors."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all members.

        Args:
            path: of the archive.

        Raises:
            InputError: it is damaged or no archive, a member is no array or one of Python objects, or a member's shape
                needs other bytes than it has.
        """
        tensors: dict[str, TensorInfo] = {}
        with _archive(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in tensors:
                    raise InputError(f"{path}: {printable(name)} is in it twice; {_REMEDY}")
                header = _read_header(path, archive, member)
                tensors[name] = TensorInfo(_stored(header.dtype), header.shape)
        super().__init__(path, path.stem, "npz", FLAX_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        array = read_npz(self.path, name)
        if (array.dtype, array.shape) != self.tensors[name]:
            raise InputError(f"{self.path}: {name} has changed since it was opened; open it again")
        return array


def read_npz(path: Path, name: str) -> np.ndarray:
    """Read one array of an archive.

    Args:
        path: of the archive.
        name: of the array.

    Returns:
        The array.

    Raises:
        InputError: there is no such array, or it cannot be read.
    """
    try:
        with _archive(path) as archive:
            if f"{name}.npy" not in (names := archive.namelist()):
                listed = ", ".join(printable(member.removesuffix(".npy")) for member in names[:_LISTED])
                raise InputError(f"{path}: has no array {printable(name)}, only {listed}; {_REMEDY}")
            member = archive.getinfo(f"{name}.npy")
            header = _read_header(path, archive, member)
            with archive.open(member) as stream:
                stream.seek(header.start)
                array = read_npy_entries(stream, header, f"{path}: {printable(name)}")
    except OSError as error:
        raise InputError(
            f"{path}: {printable(name)} cannot be read ({error.strerror or one_line(error)}); check the disk"
        ) from error
    return array.view(_stored(array.dtype))


@contextlib.contextmanager
def _archive(path: Path) -> Generator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGED as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged, or no npz archive ({one_line(error)}); {_REMEDY}") from error


def _read_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NpyHeader:
    where = f"{path}: {printable(member.filename)}"
    if not member.filename.endswith(".npy"):
        raise InputError(f"{where} is no array; {_REMEDY}")
    if member.compress_type not in _METHODS:
        raise InputError(f"{where} is compressed by method {member.compress_type}, none of numpy's; {_REMEDY}")
    with archive.open(member) as stream:
        header = read_npy_header(stream, where)
    whole = header.start + header.size == member.file_size
    if not whole or member.file_size > _MOST_DEFLATED * member.compress_size + _SLACK:
        raise InputError(
            f"{where}: shape {short_repr(header.shape)} of {printable(str(header.dtype))} needs {header.size} bytes, "
            f"which its {member.compress_size} bytes in the archive cannot hold; {_REMEDY}"
        )
    return header


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # numpy has no name for bfloat16 and writes two bytes without a meaning; no other kind of number comes out so.
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
