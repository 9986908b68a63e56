"""GGUF files: metadata and tensors, dequantised one at a time.

A file is metadata (key, type, value), a table of tensors, and their bytes. The numbers of the format and the
dequantisation are those of the `gguf` package. The metadata is read here: that package's reader takes 616 MiB and 13 s
for a vocabulary of 128,000 tokens (here 0 and 0.8 s), maps the whole file into memory, and does not end on a file with
a damaged length.
"""

import math
import struct
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from farms_jax._extras import from_extra
from farms_jax.errors import InputError, one_line, printable, short_repr
from farms_jax.weights.reading import DOWNLOAD_AGAIN, check_name, is_valid_shape, os_errors_named, read_bytes

# The format's own numbers for types of values, as codes of `struct`; text and array stand between them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes; the format's default
_FLOAT32 = np.dtype(np.float32)
_PLAIN = {
    name: np.dtype(code)
    for name, code in (("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8"), ("F64", "<f8"))
}
_LONG = 1024  # items; a longer array is a vocabulary
_PIECE = 1 << 22  # weights dequantised at a time


class GGUFTensor(NamedTuple):
    """A tensor in a file."""

    kind: Any  # quantisation, a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # in NumPy's order: (out, in)
    start: int  # offset of the first byte in the file
    row_bytes: int  # bytes of a row, that is along the last axis
    dtype: np.dtype[Any]  # of what `read_tensor` returns
    fault: str = ""  # why that cannot be


class GGUFFile(NamedTuple):
    """A file's metadata and its table of tensors, by their names in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads the metadata's values one after the other, never past the end of the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise InputError(f"{self.path}: its metadata goes past the end of the file: truncated; {DOWNLOAD_AGAIN}")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        # Sized before the format is made: a damaged count would make it endless.
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", raw)

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, *, long_arrays: bool) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        item, count = self.number("I"), self.number("Q")
        keep = long_arrays or count <= _LONG
        if item == _TEXT:
            texts = (self.text() for _ in range(count))
            return list(texts) if keep else sum(1 for _ in texts)
        if item == _ARRAY:
            raise InputError(f"{self.path}: arrays of arrays in the metadata are not known; convert the model anew")
        values = self.numbers(_code(item), count)
        return list(values) if keep else count


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"type {kind} of a value is not known")
    return _NUMBERS[kind]


def read_gguf(path: Path, *, long_arrays: bool = False) -> GGUFFile:
    """Return metadata and tensors of a little-endian GGUF file, version 2 or 3; every tensor lies inside it.

    Arrays of more than 1024 items, that is the vocabulary, are kept only with `long_arrays`; else as their lengths.

    Raises:
        InputError: The file is damaged, truncated, split, or no GGUF file.
    """
    try:
        with os_errors_named(path), path.open("rb") as file:
            return _read(_Cursor(file, path), long_arrays=long_arrays)
    except InputError:
        raise
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: its metadata is damaged ({one_line(error)}); {DOWNLOAD_AGAIN}") from error


def _read(cursor: _Cursor, *, long_arrays: bool) -> GGUFFile:
    path = cursor.path
    if cursor.take(4) != b"GGUF":
        raise InputError(f"{path}: no GGUF file (its first bytes are others); {DOWNLOAD_AGAIN}")
    version, tensor_count, key_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in {2, 3}:
        raise InputError(f"{path}: GGUF version {version} is not known (2 and 3 are); convert the model anew")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise InputError(f"{path}: {printable(key)} is in the metadata twice; {DOWNLOAD_AGAIN}")
        metadata[key] = cursor.value(long_arrays=long_arrays)
    if metadata.get("split.count", 1) != 1:
        raise InputError(f"{path}: one part of a split model; put it together with `llama-gguf-split --merge` first")
    entries = {}
    for _ in range(tensor_count):
        check_name(name := cursor.text(), str(path))
        dims = cursor.numbers("Q", cursor.number("I"))
        entries[name] = (dims[::-1], cursor.number("I"), cursor.number("Q"))
    if len(entries) != tensor_count:
        raise InputError(f"{path}: two tensors have the same name; {DOWNLOAD_AGAIN}")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise InputError(
            f"{path}: general.alignment {short_repr(alignment)} is not a positive number; {DOWNLOAD_AGAIN}"
        )
    start = -(-cursor.file.tell() // alignment) * alignment
    tensors = {
        name: _tensor(path, name, shape, kind, start + offset, cursor.size)
        for name, (shape, kind, offset) in entries.items()
    }
    return GGUFFile(path, metadata, tensors)


def _package(path: Path) -> Any:
    with from_extra("diagnose", f"{path}: a GGUF file"):
        import gguf
        import gguf.quants  # noqa: F401 (gguf alone does not bring it)
    return gguf


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int, size: int) -> GGUFTensor:
    gguf = _package(path)
    where = f"{path}: {name}"
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        return GGUFTensor(None, shape, start, 0, _FLOAT32, f"quantisation {number} is not known ({one_line(error)})")
    fault = ""
    if kind.name not in _PLAIN:
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as error:
            fault = f"quantisation {kind.name} cannot be undone here ({one_line(error)})"
    if not shape or 0 in shape or shape[-1] % block or not is_valid_shape(shape, _FLOAT32.itemsize):
        raise InputError(
            f"{where}: shape {short_repr(shape)} is not one of {kind.name}, whose rows have blocks of {block}; "
            f"{DOWNLOAD_AGAIN}"
        )
    row_bytes = shape[-1] // block * block_bytes
    if start + math.prod(shape[:-1]) * row_bytes > size:
        raise InputError(f"{where}: goes past the end of the file: truncated; {DOWNLOAD_AGAIN}")
    return GGUFTensor(kind, shape, start, row_bytes, _PLAIN.get(kind.name, _FLOAT32), fault)


def quantisation_of(file: GGUFFile) -> str:
    """Return in words how a file is quantised, such as "Q4_K_M (Q4_K 168, Q6_K 43, F32 61)"; empty where it is not."""
    counts = Counter("unknown" if tensor.kind is None else tensor.kind.name for tensor in file.tensors.values())
    if counts.keys() <= {"F32", "F64"}:
        return ""
    told = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    try:
        named = _package(file.path).LlamaFileType(file.metadata.get("general.file_type")).name
    except ValueError:
        return told
    return f"{named.removeprefix('MOSTLY_')} ({told})"


def read_tensor(file: GGUFFile, name: str, number: int = 0, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read and dequantise one tensor, or the part of this number and shape.

    Beside the result, memory holds a few million weights at a time.

    Returns:
        New array of the tensor's dtype: float32, but for integers and float64 that are stored as such.

    Raises:
        InputError: It cannot be dequantised, or the file ends too early.
    """
    tensor, dequantize = file.tensors[name], _package(file.path).quants.dequantize
    if tensor.fault:
        raise InputError(f"{file.path}: {name}: {tensor.fault}; give a file in F16, F32 or Q8_0")
    shape = tensor.shape if shape is None else shape
    rows = math.prod(shape[:-1])
    start = tensor.start + number * rows * tensor.row_bytes
    out = np.empty((rows, tensor.shape[-1]), tensor.dtype)
    step = max(1, _PIECE // tensor.shape[-1])
    for first in range(0, rows, step):
        count = min(step, rows - first)
        stored = np.empty(count * tensor.row_bytes, np.uint8)
        read_bytes(file.path, start + first * tensor.row_bytes, stored, name)
        if tensor.kind.name in _PLAIN:
            out[first : first + count] = stored.view(tensor.dtype).reshape(count, -1)
        else:
            out[first : first + count] = dequantize(stored.reshape(count, -1), tensor.kind)
    return out.reshape(shape)
