"""Archives of numpy arrays (`numpy.savez`), read member by member; nothing is ever unpickled."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from farms_jax._matrices import FLAX_AXES
from farms_jax.errors import InputError
from farms_jax.weights.safetensors_file import TensorInfo
from farms_jax.weights.source import WeightSource

_REMEDY = "write it again with numpy.savez"
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What reading a damaged archive comes to: NotImplementedError for a method, RuntimeError for a password.
_DAMAGED = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_MOST_DEFLATED = 1032  # bytes that one byte of a deflated stream can stand for
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
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    name = member.filename.removesuffix(".npy")
                    if name in tensors:
                        raise InputError(f"{path}: {name} is in it twice; {_REMEDY}")
                    tensors[name] = _read_info(path, archive, member)
        except _DAMAGED as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: damaged, or no npz archive ({error}); {_REMEDY}") from error
        super().__init__(path, path.stem, "npz", FLAX_AXES, tensors)

    def _read(self, name: str) -> np.ndarray:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                array = npy.read_array(stream, allow_pickle=False)
        except OSError as error:
            raise InputError(
                f"{self.path}: {name} cannot be read ({error.strerror or error}); check the disk"
            ) from error
        except (KeyError, *_DAMAGED) as error:
            raise InputError(f"{self.path}: {name} is damaged ({error}); {_REMEDY}") from error
        dtype, shape = self.tensors[name]
        if array.shape != shape:
            raise InputError(f"{self.path}: {name} has changed since it was opened; open it again")
        return array.view(dtype)


def _read_info(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> TensorInfo:
    where = f"{path}: {member.filename}"
    if not member.filename.endswith(".npy"):
        raise InputError(f"{where} is no array; {_REMEDY}")
    with archive.open(member) as stream:
        dtype, shape = _read_header(where, stream)
        start = stream.tell()
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, that is pickles, which are never loaded; save numbers instead")
    needed = math.prod(shape) * dtype.itemsize
    if start + needed != member.file_size or member.file_size > _MOST_DEFLATED * member.compress_size + _SLACK:
        raise InputError(
            f"{where}: shape {shape} of {dtype} needs {needed} bytes, which its {member.compress_size} bytes in the "
            f"archive cannot hold; {_REMEDY}"
        )
    return TensorInfo(_stored(dtype), shape)


def _read_header(where: str, stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    version = npy.read_magic(stream)
    if version not in _READERS:
        raise InputError(f"{where}: version {version} of the npy format holds no plain numbers; {_REMEDY}")
    try:
        shape, _, dtype = _READERS[version](stream)
    except Exception as error:  # of any kind: a header is an expression of Python, taken apart by Python's own parser
        raise InputError(f"{where}: its header is damaged ({error}); {_REMEDY}") from error
    return dtype, shape


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # numpy has no name for bfloat16 and writes two bytes without a meaning; no other kind of number comes out so.
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
