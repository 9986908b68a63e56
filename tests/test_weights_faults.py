"""Every fault of weights on disk is one clear error that names the file, and none is found by loading a pickle."""

import io
import json
import os
import pickle
import shlex
import shutil
import sys
import zipfile

import gguf
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization
from weights_helpers import FORMATS, arrays, close_gguf, write

from farms_jax.errors import InputError
from farms_jax.weights import open_weights

WEIGHT = np.ones((64, 64), np.float32)


class Bomb:
    """Unpickled, it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught, open_weights(path) as source:
        for name in source.tensors:
            source.read(name)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


@pytest.mark.parametrize("form", ["safetensors", "gguf", "npz", "msgpack"])
def test_a_damaged_file(tmp_path, form):
    path = write(form, tmp_path, {"w": WEIGHT})
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "truncated|damaged")
    path.write_bytes(b"\xffPNG" * 50)
    refused(path, "no GGUF file|no msgpack file|no npz archive|no safetensors file")


SHARD = safetensors.numpy.save({"w": WEIGHT})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the folder is empty"),
        ({f"{i}.png": b"" for i in range(9)}, "there are no weights in it .0.png, 1.png.*safetensors"),
        ({"model.bin": pickle.dumps(Bomb())}, "model.bin: a pickle, which can run any code.*numpy.savez"),
        (
            {"optimizer.pt": b"\x80", "rng_state_0.pth": b"\x80"},
            "there are no weights in it .optimizer.pt, rng",
        ),
        ({"a.pt": b"a", "b.ckpt": b"b", "optimizer.pt": b"c"}, "several models .a.pt, b.ckpt.; give"),
        ({"__0_0.distcp": b"0"}, "a distributed checkpoint of Torch.*format_utils dcp_to_torch"),
        ({"a.npz": b"", "b.npz": b""}, "several models .a.npz, b.npz"),
        ({"unet/model.safetensors": SHARD}, "in its folders unet"),
        ({"adapter_config.json": b"{}"}, "an adapter .LoRA or the like"),
        ({f"{n}.safetensors.index.json": b"{}" for n in "ab"}, "several models .a.safetensors.index.json"),
        (
            {"net-00001-of-00003.safetensors": SHARD},
            "net-00002-of-00003.safetensors: this shard is missing, as are 1 more",
        ),
        (
            {"a.safetensors": SHARD, "b.safetensors": SHARD},
            "w is in two files, a.safetensors and b.s.*, which are several",
        ),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, files, message):
    for name, content in files.items():
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    refused(tmp_path, message)


def test_a_path_that_is_neither_a_file_nor_a_folder(tmp_path):
    refused(tmp_path / "nothing", "no such file or folder.*hf download")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "symbolic links")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "neither a file nor a folder")


@pytest.mark.parametrize("form", FORMATS)
def test_no_right_to_read(tmp_path, form, monkeypatch):
    path = write(form, tmp_path, arrays())

    def denied(file, *_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    # Tests may run as root, who has every right.
    for function in ("pathlib.Path.open", "pathlib.Path.iterdir", "pathlib.Path.read_text", "zipfile.io.open"):
        monkeypatch.setattr(function, denied)
    refused(path, "Permission denied")


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in {"orbax-manager", "msgpack-chunked"}])
def test_gone_after_it_was_opened(tmp_path, form):
    path = write(form, tmp_path, arrays() | {"big": np.random.default_rng(0).normal(size=(128, 128)).astype("float32")})
    with open_weights(path) as source:
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match="big.*(cannot be read|damaged)") as caught:
            source.read("big")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pt", b"", "the file is empty"),
        ("weights.pt", pickle.dumps(Bomb()), "never loaded.*numpy.savez"),
        ("weights", pickle.dumps(Bomb()), "never loaded.*numpy.savez"),  # known by its first bytes
        ("weights.pt", b"PK\3\4" * 9, "weights.pt: ends too early"),
        ("weights.h5", b"\x89HDF", "damaged, not finished, or no file of Keras"),
        ("weights.png", b"\x89PNG", "not a kind of weights that can be read; give .safetensors, .gguf, .npz, .msgpack"),
    ],
)
def test_another_kind_of_file(tmp_path, name, content, message):
    (path := tmp_path / name).write_bytes(content)
    refused(path, message)


def test_without_torch_its_files_are_said_to_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder := tmp_path / "my model").mkdir()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name in ("optimizer.pt", *names):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"")
    install = r'saved by torch, which is not installed: pip install "farms-jax\[torch\]", or convert it where torch'
    with pytest.raises(InputError, match=f"{names[0]} and 1 more: {install} .*: python -c ") as caught:
        open_weights(folder)
    *_, first, second, converted = shlex.split(str(caught.value))
    assert [first, second, converted] == [str(folder / name) for name in (*names, "pytorch_model.safetensors")]
    with pytest.raises(InputError, match=f"optimizer.pt: {install}"):
        open_weights(folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        *((form, "two\nlines", r"'two\\nlines'") for form in ("safetensors", "gguf", "npz", "msgpack")),
        ("safetensors", "9" * 5000, "'99999.*99999'"),
    ],
)
def test_a_name_that_cannot_be_shown(tmp_path, form, name, message):
    refused(write(form, tmp_path, {name: WEIGHT}), f"a tensor is called {message}, which is no name")


# GGUF


def test_heads_that_do_not_divide_the_rows(tmp_path):
    writer = gguf.GGUFWriter(path := tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 5)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 4), np.float32))
    close_gguf(writer)
    refused(path, "model.layers.0.self_attn.q_proj.weight has 8 rows, which 5 heads of two halves do not divide")


def test_more_axes_than_an_array_can_have(tmp_path):
    path = write("gguf", tmp_path, {"w": np.ones((2, 3), np.float32)})
    content = path.read_bytes()
    axes = (2).to_bytes(4, "little") + (3).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert content.count(axes) == 1
    many = (70).to_bytes(4, "little") + (3).to_bytes(8, "little") + (2).to_bytes(8, "little")
    path.write_bytes(content.replace(axes, many + (1).to_bytes(8, "little") * 68) + bytes(1000))
    refused(path, r"w: shape \(1, 1, .* is not one of F32")


# npz


def npy(array, *, pickled=False):
    np.lib.format.write_array(file := io.BytesIO(), array, allow_pickle=pickled)
    return file.getvalue()


HUGE = npy(WEIGHT).replace(b"(64, 64), }      ", b"(64000000, 64), }")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("w.npy", npy(np.array([Bomb()]), pickled=True))], "w.npy holds Python objects"),
        ([("w.npy", HUGE)], r"w.npy: shape \(64000000, 64\) of float32 needs 16384000000 bytes"),
        ([("w.npy", npy(WEIGHT)[:-4])], "w.npy: shape"),
        ([("w.npy", npy(WEIGHT) + b"more")], "w.npy: shape"),
        ([("w.npy", npy(WEIGHT)), ("README.md", b"about")], "README.md is no array"),
        ([("w.npy", npy(WEIGHT)), ("w.npy", npy(WEIGHT))], "w is in it twice"),
        ([("w.npy", b"\x93NUMPY\x03" + npy(WEIGHT)[7:])], r"version \(3, 0\)"),
        ([("w.npy", HUGE.replace(b"(64000000, 64)", b"(-64, -64)    "))], r"no array of shape \(-64, -64\)"),
        ([("w.npy", HUGE.replace(b"(64000000, 64)", b"(True, 4096)  "))], r"no array of shape \(True, 4096\)"),
        ([("w.npy", HUGE.replace(b"(64000000, 64)", b"(0, 2" + b"0" * 9))], "damaged, or no npz archive"),
        ([("w.npy", HUGE.replace(b"'<f4'", b"'|V0'"))], r"its entries are \|V0, no plain numbers"),
        ([("w.npy", b"no array at all, but text")], "damaged, or no npz archive .the magic string"),
        ([("w.npy", npy(WEIGHT), zipfile.ZIP_LZMA)], "w.npy is compressed by method 14, none of NumPy's"),
        ([], "there are no arrays in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_faulty_npz(tmp_path, members, message):
    with zipfile.ZipFile(path := tmp_path / "model.npz", "w") as archive:
        for member in members:
            archive.writestr(*member)
    refused(path, message)


def test_an_npz_that_claims_more_than_it_can_hold(tmp_path):
    """A member of 1 TiB in 4 KiB: refused before memory is taken."""
    header = npy(np.zeros(1, np.uint8))[:128]
    size = 1 << 40
    header = header.replace(b"(1,), ", b"(%d,), " % (size - 128))[:127] + b"\n"
    with zipfile.ZipFile(path := tmp_path / "model.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", header + bytes(4000))
    content = path.read_bytes()
    # The directory's entry, with the size in its extra field, as files above 4 GiB have it.
    start = content.index(b"PK\1\2")
    extra = b"\1\0\x08\0" + size.to_bytes(8, "little")
    entry = bytearray(content[start : start + 46])
    entry[24:28], entry[30:32] = b"\xff" * 4, len(extra).to_bytes(2, "little")
    end = bytearray(content[content.index(b"PK\5\6") :])
    end[12:16] = (len(entry) + 5 + len(extra)).to_bytes(4, "little")
    path.write_bytes(content[:start] + bytes(entry) + b"w.npy" + extra + bytes(end))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("w.npy").file_size == size
    refused(path, "w.npy: shape .* bytes in the archive cannot hold")


# msgpack


def extension(code, content):
    return msgpack.packb({"w": msgpack.ExtType(code, content)})


def packed(shape=(2, 2), dtype="float32", data=bytes(16)):
    return extension(1, msgpack.packb((shape, dtype, data)))


def pieces(**changes):
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": WEIGHT[0, :2], "1": WEIGHT[0, :2]}}
    return serialization.msgpack_serialize({"w": {key: value for key, value in (whole | changes).items() if value}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (extension(42, b"foreign"), "extension 42 of msgpack is none of Flax's"),
        (b"\x81\xa1w\xd6\xff\0\0\0\0", "extension -1 of msgpack"),  # a time
        (packed(shape=(2, 3)), r"an array of shape \(2, 3\) and float32 has 30 bytes"),
        (packed(shape=(-2, -2)), r"has the shape \[-2, -2\]"),
        (packed(shape=(1,) * 70 + (4,)), r"an array of shape \(1, 1, .* has 101 bytes"),
        (packed(shape=(0, 2**63), data=b""), r"an array of shape \(0, 9223372036854775808\) and float32 has"),
        (packed(dtype="object"), "has the dtype 'object'"),
        (packed(dtype="finfo"), "has the dtype 'finfo'"),
        (packed(data="text"), "has 17 bytes"),
        (extension(1, msgpack.packb([1, 2])), r"is not \(shape, dtype, bytes\)"),
        (extension(3, msgpack.packb(([], "float32", bytes(4))) + b"more"), "has 20 bytes"),
        (pieces(shape={"0": 5}), "its pieces have 4 entries"),
        (pieces(chunks={}), "needs a shape and its pieces"),
        (pieces(chunks={"0": WEIGHT[0, :2], "2": WEIGHT[0, :2]}), "needs a shape and its pieces"),
        (pieces(chunks={"0": WEIGHT[0, :2], "1": WEIGHT[0, :2].astype(np.float16)}), "its pieces have 4 entries"),
        (msgpack.packb([1, 2]), "does not start with a map"),
        (msgpack.packb({1: 2}), "key 1 of a map is no text"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' of a map is no text, or there twice"),
        (msgpack.packb({"a": 1}) + b"\x01", "1 bytes after its tree"),
        (b"\x81\xa1a\xc1", "damaged at byte 3 .FormatError"),
        (b"\x81\xa1a" * 200 + b"\x01", "more than 100 maps in maps"),
        (b"\xdf\xff\xff\xff\xff\xa1a\x01", "truncated"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (msgpack.packb({"a": 1, "b": {}}), "there are no arrays in it"),
    ],
)
def test_a_faulty_msgpack(tmp_path, content, message):
    (path := tmp_path / "model.msgpack").write_bytes(content)
    refused(path, message)


# Orbax


def remove_data(folder):
    for file in [*folder.glob("ocdbt.process_0/d/*"), *folder.glob("layers.2.kernel/0*")]:
        file.unlink()


def cut_data(folder):
    for file in [*folder.glob("**/d/*"), *folder.glob("layers.2.kernel/0*")]:
        file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("form", ["orbax", "orbax-zarr3", "orbax-folders"])
@pytest.mark.parametrize("damage", [remove_data, cut_data])
def test_damaged_data_of_orbax(tmp_path, form, damage):
    path = write(form, tmp_path, arrays() | {"big": np.random.default_rng(0).normal(size=(128, 128))})
    damage(path)
    refused(path, "(is missing or damaged|cannot be read)")


def table_of(name):
    leaf = {"key_metadata": [{"key": name}], "value_metadata": {"value_type": "jax.Array"}}
    return json.dumps({"tree_metadata": {"w": leaf}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"tree_metadata": {', "_METADATA: not valid JSON"),
        ("{}", "_METADATA: not a table of Orbax"),
        ('{"tree_metadata": {"w": 3}}', "not a table of Orbax"),
        ('{"tree_metadata": {}}', "there are no arrays in it"),
        # The library refuses an array in no folder before it starts.
        (table_of(""), " is missing or damaged"),
        (table_of("\x1b[31mred"), r"a tensor is called '\\x1b\[31mred', which is no name"),
        (None, "without _METADATA"),
    ],
)
def test_a_damaged_table_of_orbax(tmp_path, table, message):
    path = write("orbax", tmp_path, arrays())
    (path / "_METADATA").unlink()
    if table is not None:
        (path / "_METADATA").write_text(table)
    refused(path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Each of these ended the process, inside the library.
        ({"shape": [8 * 10**9, 4]}, r"w is missing or damaged .its files cannot hold .* shape \(8000000000, 4\)"),
        ({"chunks": [2**31 - 1, 64]}, r"its files cannot hold .* shape \(2147483647, 64\)"),
        ({"fill_value": "deep"}, "w is missing or damaged .*recursion"),
    ],
)
def test_an_orbax_array_that_would_end_the_process(tmp_path, changes, message):
    path = write("orbax-folders", tmp_path, {"w": WEIGHT})
    table = json.loads((path / "w" / ".zarray").read_text()) | changes
    (path / "w" / ".zarray").write_text(json.dumps(table).replace('"deep"', "[" * 10**5 + "]" * 10**5))
    refused(path, message)


def test_an_orbax_array_without_its_folder(tmp_path):
    path = write("orbax-folders", tmp_path, arrays())
    shutil.rmtree(path / "norm.scale")
    refused(path, "norm/scale is missing or damaged.*save it again")


def test_an_orbax_checkpoint_that_is_not_finished(tmp_path):
    path = write("orbax-manager", tmp_path, arrays())
    (path / "10").rename(path / "10.orbax-checkpoint-tmp")
    assert open_weights(path).name == "checkpoint, step 9"


# Packages that are not there


@pytest.mark.parametrize(
    ("form", "package"),
    [("gguf", "gguf"), ("orbax", "tensorstore"), ("msgpack", "msgpack"), ("safetensors", "safetensors")],
)
def test_a_missing_package_says_what_to_install(tmp_path, form, package, monkeypatch):
    path = write(form, tmp_path, arrays())
    monkeypatch.setitem(sys.modules, package, None)
    refused(path, r'pip install "farms-jax\[diagnose\]"')
