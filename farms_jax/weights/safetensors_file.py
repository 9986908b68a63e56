"""Safetensors files: where each tensor lies, in files that are read and in those that will be written.

A file is eight bytes with the length of a JSON header (little-endian), the header, and the tensors' bytes. The
`safetensors` package checks headers; its writer needs all values at once, so the header of a file that is written
tensor by tensor is made here.

>>> import numpy as np
>>> layout = make_layout({"weight": TensorInfo(np.dtype("float32"), (2, 3))})
>>> layout.header[8:].decode().rstrip()
'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax._extras import from_extra
from farms_jax.errors import InputError, one_line, short_repr
from farms_jax.weights.reading import (
    DOWNLOAD_AGAIN,
    TensorInfo,
    check_name,
    is_valid_shape,
    os_errors_named,
    read_bytes,
)

# Widest last: the format's own writer lays files out from the end of this table to its start, so that every tensor is
# aligned to its items.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_BITS = {DTYPES["F4"]: 4, DTYPES["F6_E2M3"]: 6, DTYPES["F6_E3M2"]: 6}  # which no array of NumPy's packs
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file; its bytes are [start, stop) of the whole file."""

    info: TensorInfo
    start: int
    stop: int


class FileLayout(NamedTuple):
    """Where everything is in a file."""

    header: bytes  # all before the tensors
    tensors: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]  # free text of the header
    size: int  # bytes of the file


def read_layout(path: Path) -> FileLayout:
    """Read and check a file's header: every tensor lies inside the file, every byte belongs to exactly one."""
    with from_extra("diagnose", f"{path}: a safetensors file"):
        import safetensors
    try:
        with os_errors_named(path), path.open("rb") as raw, safetensors.safe_open(path, framework="numpy") as file:
            size = path.stat().st_size
            infos = {name: _info(path, name, file.get_slice(name)) for name in file.offset_keys()}
            # The package has made sure that the tensors fill the file, without gaps, from the header to the end.
            header = raw.read(size - sum(map(_num_bytes, infos.values())))
            metadata = file.metadata() or _of_mlx(header)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path}: damaged, truncated, or no safetensors file ({one_line(error)}); {DOWNLOAD_AGAIN}"
        ) from error
    return FileLayout(header, _entries(infos, len(header)), metadata, size)


def _num_bytes(info: TensorInfo) -> int:
    """Return the size of a tensor in a file."""
    return math.prod(info.shape) * _BITS[info.dtype] // 8 if info.dtype in _BITS else info.nbytes


def _of_mlx(header: bytes) -> dict[str, str]:
    # Where none is given, MLX alone writes that there is no metadata.
    return {"format": "mlx"} if header[8:].startswith(b'{"__metadata__":null') else {}


def _info(path: Path, name: str, tensor: Any) -> TensorInfo:
    check_name(name, str(path))
    code, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if code not in DTYPES:
        raise InputError(
            f"{path}: {name}: unknown dtype {short_repr(code)}; give a checkpoint in float32, float16 or bfloat16"
        )
    if not is_valid_shape(shape, DTYPES[code].itemsize):
        raise InputError(f"{path}: {name}: there can be no array of shape {short_repr(shape)}; {DOWNLOAD_AGAIN}")
    return TensorInfo(DTYPES[code], shape)


def read_tensor(path: Path, name: str, entry: Entry) -> np.ndarray:
    """Read one tensor into a writable array; an InputError if the file has become shorter since it was opened."""
    if entry.info.dtype in _BITS:
        raise InputError(f"{path}: {name} is packed, in {entry.info.dtype}, which is not read; give it in bfloat16")
    array = np.empty(entry.stop - entry.start, np.uint8)
    read_bytes(path, entry.start, array, name)
    return array.view(entry.info.dtype).reshape(entry.info.shape)


def make_layout(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Return the layout of a new file, with the same header as the `safetensors` package writes.

    Tensors are ordered by dtype, the widest first, then by name, and their bytes begin at a multiple of eight. Of the
    metadata, `{"format": "pt"}` is what transformers needs.

    Raises:
        InputError: The format lacks one of the dtypes.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    for name, (dtype, _) in tensors.items():
        if dtype not in ranks or dtype in _BITS:
            raise InputError(f"{name}: safetensors files hold no {dtype}; convert it to float32")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-ranks[item[1].dtype], item[0])))
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, ((dtype, shape), start, stop) in _entries(ordered, 0).items():
        content[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    size = len(header) + sum(map(_num_bytes, tensors.values()))
    return FileLayout(header, _entries(ordered, len(header)), dict(metadata or {}), size)


def _entries(tensors: Mapping[str, TensorInfo], start: int) -> dict[str, Entry]:
    """Place tensors one after the other, the first at byte `start`."""
    entries = {}
    for name, info in tensors.items():
        stop = start + _num_bytes(info)
        entries[name] = Entry(info, start, stop)
        start = stop
    return entries
