"""Headers of safetensors files: made like the format's own package does, checked, and refused."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from prune_helpers import DATA

from farms_jax.errors import InputError
from farms_jax.weights.safetensors_file import MAX_HEADER, TensorInfo, make_header, parse_header, read_header

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def test_header_is_the_one_of_the_safetensors_package():
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.{dtype.__name__}": rng.normal(size=shape).astype(dtype)
        for dtype in (*DTYPES, np.int64, np.uint8, np.bool_)
        for name, shape in (("b", (3, 5)), ("a", (2,)), ("scalar", ()), ("empty", (0, 4)), ("é", (1, 1, 7)))
    }
    theirs = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    ours = make_header({name: TensorInfo(a.dtype, a.shape) for name, a in tensors.items()}, {"format": "pt"})
    assert theirs[: len(ours)] == ours
    header = parse_header(theirs[: len(ours)], len(theirs), "made")
    for name, array in tensors.items():
        entry = header.tensors[name]
        assert theirs[entry.start : entry.stop] == array.tobytes()


def test_header_refuses_a_dtype_that_the_format_lacks():
    with pytest.raises(InputError, match=r"w: .*complex128.*float32"):
        make_header({"w": TensorInfo(np.dtype(np.complex128), (1,))})


# Damage to one file: its header's content and its data -> both anew, and what the error says.


def file_bytes(header, data, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


DATA_24 = bytes(24)
TWO = {"a": entry(), "b": entry(offsets=(24, 48))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x10\0\0\0\0\0\0", "7 bytes are too few"),
        (file_bytes({"a": entry()}, DATA_24, length=1 << 20), "truncated, or no safetensors file"),
        (file_bytes(b"<html>", b"", length=0x6C6D74683C), "truncated, or no safetensors file"),
        (file_bytes(b"{", DATA_24), "not valid JSON"),
        (file_bytes(b'{"\xff": 1}', DATA_24), "not valid JSON"),
        (file_bytes(b"[" * 100_000, b""), "not valid JSON"),
        (file_bytes(b"[1]", b""), "not a JSON object"),
        (file_bytes({"a": entry(dtype="F8_E4M3")}, DATA_24), "a: unknown dtype 'F8_E4M3'.*bfloat16"),
        (file_bytes({"a": entry(dtype=["F32"])}, DATA_24), "a: unknown dtype"),
        (file_bytes({"a": entry(shape=(2, -3))}, DATA_24), "a: shape .* not a list of whole numbers"),
        (file_bytes({"a": entry(shape=(2, 3.0))}, DATA_24), "a: shape .* not a list of whole numbers"),
        (file_bytes({"a": entry(shape=(True, 6))}, DATA_24), "a: shape .* not a list of whole numbers"),
        (
            file_bytes({"a": entry(shape=(2, 4))}, DATA_24),
            r"a: shape \[2, 4\] of F32 needs 32 bytes, the file gives 24",
        ),
        (file_bytes({"a": entry(shape=(10**30, 10**30))}, DATA_24), "a: there can be no array of shape"),
        (file_bytes({"a": entry(offsets=(24, 0))}, DATA_24), r"a: data_offsets \[24, 0\]"),
        (file_bytes({"a": entry(offsets=(0, 12, 24))}, DATA_24), "a: data_offsets"),
        (file_bytes({"a": {"dtype": "F32"}}, DATA_24), "a: its entry needs exactly"),
        (file_bytes({"a": entry(extra=1)}, DATA_24), "a: its entry needs exactly"),
        (file_bytes(TWO, bytes(47)), "b should end at byte .*truncated"),
        (file_bytes(TWO, bytes(49)), "1 bytes after the last tensor"),
        (file_bytes({"a": entry(), "b": entry(offsets=(12, 36))}, bytes(36)), "b overlaps another tensor"),
        (file_bytes({"a": entry(), "b": entry(offsets=(28, 52))}, bytes(52)), "b leaves bytes before it"),
        (file_bytes({"a": entry(offsets=(4, 28))}, bytes(28)), "a leaves bytes before it"),
        (file_bytes(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), DATA_24), "twice in it: a"),
        (file_bytes({"__metadata__": {"format": 1}, "a": entry()}, DATA_24), "__metadata__"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "download it again" in str(caught.value) or "give a checkpoint in" in str(caught.value)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 1000)  # sparse: takes no space
    tracemalloc.start()
    with pytest.raises(InputError, match="header should have 100000001 bytes"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_mutated_headers_raise_nothing_else_and_take_no_memory():
    whole = (DATA / "opt_tiny" / "model.safetensors").read_bytes()
    header = whole[: 8 + int.from_bytes(whole[:8], "little")]
    rng, refused = np.random.default_rng(0), 0
    digits = np.flatnonzero([chr(byte) in "0123456789" for byte in header])
    tracemalloc.start()
    for trial in range(500):
        mutant = bytearray(header)
        # Half of the changes keep it JSON: they are digits put for digits.
        places = rng.choice(digits, 2) if trial % 2 else rng.integers(8, len(header), rng.integers(1, 5))
        for place in places:
            mutant[place] = rng.choice(list(b"0123456789")) if trial % 2 else rng.integers(256)
        if trial % 10 == 9:
            mutant = mutant[: rng.integers(8, len(mutant))]
        try:
            parse_header(bytes(mutant), len(whole), "mutant")
        except InputError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 300
    assert peak < 64 * len(header)
