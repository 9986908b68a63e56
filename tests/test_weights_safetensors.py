"""Safetensors files: laid out as the format's own package does, and refused where they are damaged."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from farms_jax.errors import InputError
from farms_jax.weights import TensorInfo
from farms_jax.weights.safetensors_file import make_layout, read_layout


def test_layout_is_the_one_of_the_safetensors_package(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.{np.dtype(dtype).name}": rng.normal(size=shape).astype(dtype)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)
        for name, shape in (("b", (3, 5)), ("a", (2,)), ("scalar", ()), ("empty", (0, 4)), ("é", (1, 1, 7)))
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({name: np.asarray(a) for name, a in tensors.items()}, path, {"format": "pt"})
    ours = make_layout({name: TensorInfo(a.dtype, a.shape) for name, a in tensors.items()}, {"format": "pt"})
    assert ours == read_layout(path)
    content = path.read_bytes()
    assert (content[: len(ours.header)], len(content)) == (ours.header, ours.size)
    for name, array in tensors.items():
        entry = ours.tensors[name]
        assert content[entry.start : entry.stop] == array.tobytes()


def test_a_dtype_that_the_format_lacks_is_refused():
    with pytest.raises(InputError, match=r"w: .*complex128.*float32"):
        make_layout({"w": TensorInfo(np.dtype(np.complex128), (1,))})


def file_bytes(header, data=bytes(24), *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWO = {"a": entry(), "b": entry(offsets=(24, 48))}
DAMAGED = "damaged, truncated, or no safetensors file .*"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x10\0\0\0\0\0\0", DAMAGED),
        (file_bytes({"a": entry()}, length=1 << 20), DAMAGED),
        (file_bytes(b'{"\xff": 1}'), DAMAGED),
        (file_bytes({"a": entry(shape=(2, 4))}), DAMAGED),
        (file_bytes({"a": entry(shape=(2**62, 2**62, 2**62))}), DAMAGED),
        (file_bytes({"a": entry(shape=(10**4000,))}), DAMAGED),
        (file_bytes({"a": entry(dtype="a\nb" * 5000)}), DAMAGED),
        (file_bytes(TWO, bytes(47)), DAMAGED),
        (file_bytes(TWO, bytes(49)), DAMAGED),
        (file_bytes({"a": entry(), "b": entry(offsets=(12, 36))}, bytes(36)), DAMAGED),
        (file_bytes({"a": entry(), "b": entry(offsets=(28, 52))}, bytes(52)), DAMAGED),
        # The package checks shapes against bytes, not against what an array can have.
        (file_bytes({"a": entry(shape=[1] * 70 + [6])}), r"a: there can be no array of shape \(1, 1, .*\.\.\.\)"),
        (file_bytes({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b""), r"no array of shape \(0, 92233720368547758"),
        (file_bytes({"two\nlines": entry()}), r"a tensor is called 'two\\nlines', which is no name"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    (path := tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_layout(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and text.isprintable() and len(text) < 1000
    assert any(remedy in text for remedy in ("download it again", "download or write it again"))


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_001_000)  # sparse: takes no space
    tracemalloc.start()
    with pytest.raises(InputError, match="header too large"):
        read_layout(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
