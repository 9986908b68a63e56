"""Safetensors files: the header checked before anything is read, one tensor read at a time, headers made anew.

A file is eight bytes with the length of a JSON header (little-endian), the header, and the tensors' bytes. Files are
read with plain reads, not mapped: mapped pages would count as memory of the run.

>>> import numpy as np
>>> header = make_header({"weight": TensorInfo(np.dtype("float32"), (2, 3))})
>>> header[8:].decode().rstrip()
'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.sanitise import check_name, is_valid_shape, one_line, short_repr

MAX_HEADER = 100_000_000  # bytes; the format's own limit
# Largest alignment last: files are laid out from the end of this table to its start, as the format's own writer does,
# so that every tensor is aligned to its items.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_REMEDY = "download it again"


class TensorInfo(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """A tensor in a file; its bytes are [start, stop) of the whole file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """A checked header.

    Attributes:
        raw: the eight length bytes and the JSON as they stand in the file, so that a copy can have the same bytes.
        tensors: name -> entry, in the order of their bytes.
        metadata: the header's free text, name -> value.
        size: of the file in bytes.
    """

    raw: bytes
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Args:
        path: of a safetensors file.

    Returns:
        The header; every tensor lies inside the file, has the bytes that its shape and dtype need, and no byte
        belongs to none or to two.

    Raises:
        InputError: the file is damaged, truncated, no safetensors file, or of a dtype that is not known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise InputError(f"{path}: {size} bytes are too few for a safetensors file; {_REMEDY}")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER or 8 + length > size:
                raise InputError(
                    f"{path}: its header should have {length} bytes, but the file has {size} (and a header at most "
                    f"{MAX_HEADER}): truncated, or no safetensors file; {_REMEDY}"
                )
            raw = start + file.read(length)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    return parse_header(raw, size, str(path))


def parse_header(raw: bytes, size: int, name: str) -> Header:
    """Check a header.

    Args:
        raw: the eight length bytes and the JSON.
        size: of the whole file in bytes.
        name: of the file, for messages.

    Returns:
        The header.

    Raises:
        InputError: see `read_header`.
    """
    try:
        content = json.loads(raw[8:].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: the safetensors header is not valid JSON ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: the safetensors header is not a JSON object; {_REMEDY}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{name}: __metadata__ of the safetensors header is not a table of texts; {_REMEDY}")
    for tensor in content:
        check_name(tensor, name)
    entries = {tensor: _entry(fields, len(raw), f"{name}: {tensor}") for tensor, fields in content.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = len(raw)
    for tensor, entry in ordered.items():
        if entry.stop > size:
            raise InputError(
                f"{name}: {tensor} should end at byte {short_repr(entry.stop)}, but the file has {size}: truncated; "
                f"{_REMEDY}"
            )
        if entry.start != end:
            fault = "overlaps another tensor" if entry.start < end else "leaves bytes before it that no tensor owns"
            raise InputError(
                f"{name}: {tensor} {fault} (starts at byte {short_repr(entry.start)}, expected {end}); {_REMEDY}"
            )
        end = entry.stop
    if end != size:
        raise InputError(f"{name}: {size - end} bytes after the last tensor belong to none; {_REMEDY}")
    return Header(raw, ordered, metadata, size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"twice in it: {counts.most_common(1)[0][0]}")
    return content


def _entry(fields: Any, data_start: int, where: str) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its entry needs exactly dtype, shape and data_offsets; {_REMEDY}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise InputError(
            f"{where}: unknown dtype {short_repr(code)}; give a checkpoint in float32, float16 or bfloat16"
        )
    if not _are_sizes(shape):
        raise InputError(f"{where}: shape {short_repr(shape)} is not a list of whole numbers >= 0; {_REMEDY}")
    if not is_valid_shape(shape, DTYPES[code].itemsize):
        raise InputError(f"{where}: there can be no array of shape {short_repr(shape)}; {_REMEDY}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets {short_repr(offsets)} are not [start, stop]; {_REMEDY}")
    needed, given = math.prod(shape) * DTYPES[code].itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise InputError(
            f"{where}: shape {short_repr(shape)} of {code} needs {needed} bytes, the file gives "
            f"{short_repr(given)}; {_REMEDY}"
        )
    return Entry(DTYPES[code], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    # type(), not isinstance(): true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensor(path: Path, name: str, entry: Entry) -> np.ndarray:
    """Read one tensor.

    Args:
        path: of the file.
        name: of the tensor, for messages.
        entry: from the file's header.

    Returns:
        Array of the entry's shape and dtype, writable.

    Raises:
        InputError: the file cannot be read, or has become shorter.
    """
    array = np.empty(entry.stop - entry.start, np.uint8)
    read_bytes(path, entry.start, array, name)
    return array.view(entry.dtype).reshape(entry.shape)


def read_bytes(path: Path, start: int, out: np.ndarray, name: str) -> None:
    """Fill an array with bytes of a file.

    Args:
        path: of the file.
        start: first byte.
        out: uint8, shape (bytes,); filled.
        name: of the tensor, for messages.

    Raises:
        InputError: the file cannot be read, or ends too early.
    """
    view, done = memoryview(out.data), 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            # One call reads at most 2 GiB on Linux.
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise InputError(f"{path}: {name} cannot be read ({error.strerror or error}); check the disk") from error
    if done < len(view):
        raise InputError(f"{path}: ends inside {name}: truncated; {_REMEDY}")


def make_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> bytes:
    """Lay out a file.

    Args:
        tensors: name -> what it is.
        metadata: free text, name -> value; transformers wants `{"format": "pt"}`.

    Returns:
        The length bytes and the JSON, padded so that the data begins at a multiple of eight. The same bytes that the
        `safetensors` package writes: tensors ordered by dtype, the widest first, then by name.

    Raises:
        InputError: a dtype that the format does not have.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    for name, (dtype, _) in tensors.items():
        if dtype not in ranks:
            raise InputError(f"{name}: safetensors files hold no {dtype}; convert it to float32")
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-ranks[item[1].dtype], item[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
