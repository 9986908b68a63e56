"""Archives of NumPy arrays (`numpy.savez`), read member by member, and single ones; nothing is ever unpickled."""

import contextlib
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from farms_jax.errors import InputError, one_line, printable, short_repr
from farms_jax.weights.layout import layout_of
from farms_jax.weights.reading import TensorInfo, is_valid_shape, os_errors_named
from farms_jax.weights.source import WeightSource

_REMEDY = "write it again with numpy.savez"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # NumPy's; others have no bound on what they grow to
_MAX_DEFLATED = 1032  # bytes that one byte of a deflated stream can stand for
_SLACK = 1 << 16  # bytes; streams shorter than this may be denser


class NpzSource(WeightSource):
    """Weights in an `.npz` archive, named as its members."""

    in_order = True

    def __init__(self, path: Path) -> None:
        """Read and check the headers of all members."""
        tensors: dict[str, TensorInfo] = {}
        with _damage_named(path), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in tensors:
                    raise InputError(f"{path}: {printable(name)} is in it twice; {_REMEDY}")
                tensors[name] = _read_info(archive, member, f"{path}: {printable(member.filename)}")
        super().__init__(path, path.stem, "npz", lambda weights: layout_of(weights, {}, "flax"), tensors)

    def _read(self, name: str) -> np.ndarray:
        with (
            os_errors_named(self.path, name, "check the disk"),
            _damage_named(self.path),
            np.load(self.path, allow_pickle=False) as archive,
        ):
            array = archive[f"{name}.npy"]
        return _unchanged(self, name, array)


class NpySource(WeightSource):
    """One array in an `.npy` file, called as the file."""

    def __init__(self, path: Path) -> None:
        """Read and check its header."""
        with _damage_named(path), path.open("rb") as file:
            info = _read_header(file, str(path))
            size = file.tell() + info.nbytes
        if size != path.stat().st_size:
            raise InputError(
                f"{path}: its size is not that of {short_repr(info.shape)} {info.dtype}: damaged, or not "
                f"finished; {_REMEDY}"
            )
        tensors = {path.stem: TensorInfo(_stored_dtype(info.dtype), info.shape)}
        super().__init__(path, path.stem, "npy", lambda weights: layout_of(weights, {}, "flax"), tensors)

    def _read(self, name: str) -> np.ndarray:
        with os_errors_named(self.path, name, "check the disk"), _damage_named(self.path):
            array = np.load(self.path, allow_pickle=False)
        return _unchanged(self, name, array)


def _unchanged(source: WeightSource, name: str, array: np.ndarray) -> np.ndarray:
    array = array.view(_stored_dtype(array.dtype))
    if (array.dtype, array.shape) != source.stored[name]:
        raise InputError(f"{source.path}: {name} has changed since it was opened; open it again")
    return array


@contextlib.contextmanager
def _damage_named(path: Path) -> Generator[None]:
    """Turn whatever a damaged archive raises into an InputError."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # of any kind: it depends on what is damaged
        raise InputError(f"{path}: damaged, or no npz archive ({one_line(error)}); {_REMEDY}") from error


def _read_info(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> TensorInfo:
    """Read a member's header: `numpy.load` would read the entries too, and allocate whatever shape it claims."""
    if not member.filename.endswith(".npy"):
        raise InputError(f"{where} is no array; {_REMEDY}")
    if member.compress_type not in _METHODS:
        raise InputError(f"{where} is compressed by method {member.compress_type}, none of NumPy's; {_REMEDY}")
    with archive.open(member) as stream:
        info = _read_header(stream, where)
        is_whole = stream.tell() + info.nbytes == member.file_size
    if not is_whole or member.file_size > _MAX_DEFLATED * member.compress_size + _SLACK:
        raise InputError(
            f"{where}: shape {short_repr(info.shape)} of {printable(str(info.dtype))} needs {info.nbytes} bytes, which "
            f"its {member.compress_size} bytes in the archive cannot hold; {_REMEDY}"
        )
    return TensorInfo(_stored_dtype(info.dtype), info.shape)


def _read_header(stream: IO[bytes], where: str) -> TensorInfo:
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise InputError(f"{where}: version {version} of the npy format holds no plain numbers; {_REMEDY}")
    shape, _, dtype = _HEADERS[version](stream)
    sizes: Sequence[Any] = shape
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, that is pickles, which are never loaded; save numbers instead")
    if dtype.itemsize == 0 or dtype.shape:
        raise InputError(f"{where}: its entries are {printable(str(dtype))}, no plain numbers; {_REMEDY}")
    # type(), not isinstance(): True is an int to Python.
    if not all(type(size) is int and size >= 0 for size in sizes) or not is_valid_shape(shape, dtype.itemsize):
        raise InputError(
            f"{where}: there can be no array of shape {short_repr(shape)} and {printable(str(dtype))}; {_REMEDY}"
        )
    return TensorInfo(dtype, shape)


def _stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # NumPy has no name for bfloat16 and writes two bytes without a meaning; no other kind of number comes out so.
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
