"""Hugging Face folders and safetensors files: what is read, written back, and refused."""

import hashlib
import json

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from prune_helpers import DATA, config_of, weights_of, write_folder, written_back

from farms_jax.errors import InputError
from prune.checkpoints import open_checkpoint, open_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A model in three shards."""
    return write_folder(tmp_path / "model", weights_of("llama_tiny"), shards=3)


@pytest.mark.parametrize(
    ("model", "dtype", "shards"),
    [("llama_tiny_bias", np.float32, 1), ("opt_tiny", np.float16, 2), ("llama_tiny_tied", ml_dtypes.bfloat16, 3)],
)
def test_a_folder_comes_back_byte_for_byte(tmp_path, model, dtype, shards):
    tensors = {name: array.astype(dtype) for name, array in weights_of(model).items()}
    folder = write_folder(tmp_path / "model", tensors, config=model, shards=shards)
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.config) == ("model", config_of(model))
    assert checkpoint.tensors == {name: (array.dtype, array.shape) for name, array in tensors.items()}
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    assert written_back(checkpoint) == files
    assert checkpoint.sha256() == hashlib.sha256(b"".join(files.values())).hexdigest()


def test_links_are_followed(tmp_path, folder):
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    linked = open_checkpoint(str(tmp_path / "snapshot"))
    assert written_back(linked) == written_back(open_checkpoint(str(folder)))
    linked.copy_sidecars(tmp_path / "export")
    assert not (tmp_path / "export" / "config.json").is_symlink()


def test_sidecars_are_copied_verbatim(tmp_path, folder):
    kept = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt"]
    for filename in (*kept, "README.md", "modeling_own.py", "pytorch_model.bin"):
        (folder / filename).write_bytes(f"{filename} \r\n é".encode())
    open_checkpoint(str(folder)).copy_sidecars(tmp_path / "made" / "export")
    found = {path.name: path.read_bytes() for path in (tmp_path / "made" / "export").iterdir()}
    assert found == {filename: (folder / filename).read_bytes() for filename in (*kept, "config.json", INDEX)}


def test_a_weight_file_stands_for_its_folder(folder):
    checkpoint = open_checkpoint(str(DATA / "llama_tiny" / "model.safetensors"))
    assert (checkpoint.name, checkpoint.path) == ("llama_tiny", DATA / "llama_tiny")
    safetensors.numpy.save_file({"a": np.zeros(1)}, folder / "adapter.safetensors")
    with pytest.raises(InputError, match=r"adapter\.safetensors: its folder's weights are model-00001-of-00003\.safe"):
        open_checkpoint(str(folder / "adapter.safetensors"))


# Damage to a folder of three shards: what is done, what the error says.


SHARD = "model-00002-of-00003.safetensors"


def cut_shard(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def list_tensor(name, filename):
    """Have the index say where a tensor is; `None`: nowhere."""

    def damage(folder):
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"][name] = filename
        content["weight_map"] = {key: value for key, value in content["weight_map"].items() if value}
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def write_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def drop_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


def pickle_weights(folder):
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: this shard is missing"),
        (cut_shard, f"{SHARD}: .*truncated"),
        (list_tensor("model.extra.weight", SHARD), rf"index.json: .*model.extra.weight \(not in {SHARD}"),
        (list_tensor("lm_head.weight", None), r"index.json: .*lm_head.weight \(in model-00001.*not in the index"),
        (list_tensor("lm_head.weight", "../other"), r"lm_head.weight is in '\.\./other', no plain file name"),
        (list_tensor("lm_head.weight", "a" * 300), "lm_head.weight is in 'aaa.*aaa', no plain file name"),
        (list_tensor("lm_head.weight", "a\nb"), r"lm_head.weight is in 'a\\nb', no plain file name"),
        (write_file(INDEX, b"{}"), "index.json: it has no weight_map"),
        (write_file(INDEX, b'{"weight_map": {'), "index.json: not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (write_file("config.json", b"[1]"), "config.json: not a JSON object"),
        (drop_weights, r"neither model\.safetensors nor "),
        (pickle_weights, r"pickles \(pytorch_model\.bin\).*never loaded.*save_pretrained"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=f"{message}.*(download|give)") as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_cut_after_opening_is_one_clear_error(folder):
    checkpoint = open_checkpoint(str(folder))
    *_, last = checkpoint.shards()[SHARD].tensors
    cut_shard(folder)
    with pytest.raises(InputError, match=rf"ends inside {last}: truncated; download it again"):
        checkpoint.read(last)


# Names that are no folder.


@pytest.mark.parametrize("model", ["nowhere/at/all", "llama", "/nonexistent/model.gguf"])
def test_a_path_that_does_not_exist_is_one_clear_error(model):
    with pytest.raises(InputError, match=rf"--model {model}: no such folder or file, and no hub name of .* OWNER/NAME"):
        open_checkpoint(model)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"model\.bin: neither a \.gguf nor a \.safetensors file; pickled.*never"):
        open_checkpoint(str(path))


def test_a_hub_name_is_downloaded_without_pickles_and_code(monkeypatch):
    asked = {}

    def download(repository, **settings):
        asked.update(settings, repository=repository)
        return str(DATA / "llama_tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("owner/small-model@v1.0")
    assert checkpoint.name == "owner/small-model@v1.0"
    assert checkpoint.config["model_type"] == "llama"
    assert (asked["repository"], asked["revision"]) == ("owner/small-model", "v1.0")
    listed = ("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling_own.py", "x.pt")
    wanted = huggingface_hub.utils.filter_repo_objects(listed, allow_patterns=asked["allow_patterns"])
    assert list(wanted) == ["config.json", "model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("opens", [open_checkpoint, open_tokenizer])
def test_an_unreachable_hub_is_one_clear_error(monkeypatch, opens):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"owner/model: .*\(no connection\); check the connection, or give a path"):
        opens("owner/model")


# Tokenizers.


def test_a_folder_without_a_tokenizer_names_the_flag():
    with pytest.raises(InputError, match=r"llama_tiny: there is no tokenizer.*--tokenizer PATH"):
        open_checkpoint(str(DATA / "llama_tiny")).tokenizer()


GPT2 = {"tokenizer_class": "GPT2Tokenizer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Memory for every id up to the highest: the package would end the process.
        ({"vocab.json": {"a": 0, "b": 10**9, "ab": 1}}, "tokens have ids up to 1000000000"),
        ({"vocab.json": {"a": 0, "b": 1}}, ""),  # Rust code that fails: its error is not an `Exception`
        ({"tokenizer.json": {}, "tokenizer_config.json": {}}, ""),
        ({"tokenizer_config.json": GPT2 | {"model_max_length": "long"}}, "'int' and 'str'"),
        ({"tokenizer_config.json": {"tokenizer_class": "a\nb"}}, ""),  # told in several lines
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_clear_error(tmp_path, changes, message):
    files = {"vocab.json": {"a": 0, "b": 1, "ab": 2}, "tokenizer_config.json": GPT2}
    for name, content in (files | changes).items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError, match=f"its tokenizer cannot be loaded \\(.*{message}.*--tokenizer PATH") as caught:
        open_tokenizer(str(tmp_path))
    assert str(caught.value).isprintable()


def test_code_of_a_folder_is_never_run(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')")
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="--tokenizer PATH"):
        open_checkpoint(str(folder)).tokenizer()
