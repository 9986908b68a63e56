"""Hugging Face folders and safetensors files: what is read, written back, and refused."""

import hashlib
import json
import sys

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from prune_helpers import DATA, config_of, small_run, weights_of, write_folder, written_back

from farms_jax.errors import InputError
from prune.checkpoints import open_checkpoint, open_tokenizer
from prune.job import prepare
from prune.models import make_network
from prune.output import read_masks
from prune.run import run

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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: this shard is missing"),
        (cut_shard, f"{SHARD}: .*truncated"),
        (list_tensor("lm_head.weight", "../other"), r"lm_head.weight is in '\.\./other', no plain file name"),
        (list_tensor("lm_head.weight", "a" * 300), "lm_head.weight is in 'aaa.*aaa', no plain file name"),
        (list_tensor("lm_head.weight", "a\nb"), r"lm_head.weight is in 'a\\nb', no plain file name"),
        (write_file(INDEX, b"{}"), "index.json: it has no weight_map"),
        (write_file(INDEX, b'{"weight_map": {'), "index.json: not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (write_file("config.json", b"[1]"), "config.json: not a JSON object"),
        (drop_weights, r"neither model\.safetensors nor .*; it has config\.json"),
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


def test_a_file_of_another_kind_is_refused(folder):
    (folder / "model.onnx").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"model\.onnx: its folder's weights are model-00001-of-00003\.safetensors, "):
        open_checkpoint(str(folder / "model.onnx"))


def test_files_of_torch_need_torch_or_a_command(folder, monkeypatch):
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: saved by torch, .*pip install .*python -c "):
        open_checkpoint(str(folder))


# What is accepted, as transformers accepts it.


def assert_same_network(checkpoint, model="llama_tiny"):
    """The network and its weights are those of a fixture, and a copy has them under their usual names."""
    expected = open_checkpoint(str(DATA / model))
    network = checkpoint.network()
    assert network == expected.network()
    copy = {name for layout in checkpoint.shards().values() for name in layout.tensors}
    for name in network.names():
        np.testing.assert_array_equal(checkpoint.read(name), expected.read(name))
        assert name in copy


@pytest.mark.parametrize(
    "prefixes",
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "module._orig_mod."),
        ("base_model.model.", "base_model.model."),
        ("language_model.", "language_model."),
    ],
)
def test_names_with_a_prefix_are_found_and_written_without(tmp_path, prefixes):
    inner, outer = prefixes
    names = {name: (outer if name.startswith("lm_head") else inner) + name for name in weights_of("llama_tiny")}
    renamed = {names[name]: array for name, array in weights_of("llama_tiny").items()}
    folder = write_folder(tmp_path / "model", renamed, shards=2)
    checkpoint = open_checkpoint(str(folder))
    assert_same_network(checkpoint)
    written = written_back(checkpoint)
    assert set(written) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    checkpoint.copy_sidecars(tmp_path / "export")
    index = json.loads((tmp_path / "export" / INDEX).read_text())["weight_map"]
    assert index == {n: file for file, layout in checkpoint.shards().items() for n in layout.tensors}
    for filename, content in written.items():
        (tmp_path / "export" / filename).write_bytes(content)
    assert_same_network(open_checkpoint(str(tmp_path / "export")))


def test_a_language_model_inside_another_is_found(tmp_path):
    tensors = {name.replace("model.", "model.language_model."): x for name, x in weights_of("llama_tiny").items()}
    tensors["model.vision_tower.layers.0.self_attn.q_proj.weight"] = np.ones((4, 4), np.float32)
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model", tensors)))
    assert_same_network(checkpoint)
    assert checkpoint.tensors.keys() == checkpoint.network().names()


BUFFERS = {
    "model.rotary_emb.inv_freq": (12,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (12,),
    "model.layers.1.self_attn.rotary_emb.cos_cached": (1, 1, 32, 24),
    "model.layers.1.self_attn.rotary_emb.sin_cached": (1, 1, 32, 24),
    "model.layers.2.self_attn.bias": (1, 1, 32, 32),
    "model.layers.2.self_attn.masked_bias": (),
    "rope.freqs": (12,),
}
OTHERS = {"mtp.fc.weight": (4, 4), "model.layers.4.eh_proj.weight": (4, 4), "v_head.summary.weight": (1, 96)}


@pytest.mark.parametrize("model", ["llama_tiny", "llama_tiny_tied"])
def test_buffers_and_parts_that_the_network_does_not_have_stay_as_they_are(tmp_path, model, caplog):
    extra = {name: np.ones(shape, np.float32) for name, shape in (BUFFERS | OTHERS).items()}
    folder = write_folder(tmp_path / "model", weights_of(model) | extra, config=model)
    checkpoint = open_checkpoint(str(folder))
    assert_same_network(checkpoint, model)
    assert checkpoint.is_weight("lm_head.weight") and not any(map(checkpoint.is_weight, BUFFERS))
    assert written_back(checkpoint) == {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    assert "left out, as in transformers: model.layers.4.eh_proj.weight, mtp.fc.weight, v_head" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.lora_A.weight",
        "model.layers.4.mlp.up_proj.weight",
        "lm_head.bias",
        "model.norm.bias",
    ],
)
def test_what_would_change_the_network_is_refused(tmp_path, name):
    beside = name.replace("lora_A", "lora_B")  # one alone is no adapter
    tensors = weights_of("llama_tiny") | dict.fromkeys((name, beside), np.ones((96,), np.float32))
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model", tensors)))
    with pytest.raises(InputError, match=rf"unexpected: {name} "):
        checkpoint.network()


@pytest.mark.parametrize(
    "damage",
    [
        list_tensor("mtp.fc.weight", SHARD),  # that no shard has
        list_tensor("lm_head.weight", None),  # left out
        list_tensor("lm_head.weight", SHARD),  # in another shard
        lambda folder: (folder / INDEX).unlink(),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_written_anew(folder, tmp_path, damage):
    damage(folder)
    checkpoint = open_checkpoint(str(folder))
    assert_same_network(checkpoint)
    checkpoint.copy_sidecars(tmp_path / "export")
    for filename, content in written_back(checkpoint).items():
        assert content == (folder / filename).read_bytes()
        (tmp_path / "export" / filename).write_bytes(content)
    index = json.loads((tmp_path / "export" / INDEX).read_text())
    for name, filename in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(folder / filename)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights_of("llama_tiny").values())


def test_a_tensor_in_two_shards_is_the_index_s_and_written_once(folder):
    tensors = safetensors.numpy.load_file(folder / SHARD)
    again = {"lm_head.weight": np.zeros((256, 96), np.float32)}
    safetensors.numpy.save_file(tensors | again, folder / SHARD, metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert_same_network(checkpoint)
    assert sum("lm_head.weight" in layout.tensors for layout in checkpoint.shards().values()) == 1


def test_a_needed_tensor_that_no_shard_has_is_missing(folder):
    tensors = safetensors.numpy.load_file(folder / SHARD)
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    safetensors.numpy.save_file(tensors, folder / SHARD)
    with pytest.raises(InputError, match=rf"missing: {name} "):
        open_checkpoint(str(folder)).network()


def test_a_tied_embedding_may_be_stored_as_the_head(tmp_path):
    tensors = weights_of("llama_tiny_tied")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    folder = write_folder(tmp_path / "model", tensors, config="llama_tiny_tied")
    assert_same_network(open_checkpoint(str(folder)), "llama_tiny_tied")


def test_a_folder_of_the_hub_s_cache_stands_for_its_snapshot(tmp_path):
    cache = tmp_path / "models--owner--small"
    write_folder(cache / "snapshots" / "abc", weights_of("llama_tiny"))
    checkpoint = open_checkpoint(str(cache))
    assert checkpoint.name == "owner/small"
    assert_same_network(checkpoint)


# The hub.


class Hub:
    """Stands in for the hub: files of one repository; what is downloaded is copied, and noted."""

    def __init__(self, files, folder, *, lists=True):
        self.files, self.folder, self.lists, self.downloaded, self.asked = files, folder, lists, [], []

    def list_repo_files(self, repository, *, revision):
        self.asked.append((repository, revision))
        if not self.lists:
            raise OSError("no connection")
        return list(self.files)

    def snapshot_download(self, repository, *, revision, allow_patterns, ignore_patterns):
        self.asked.append((repository, revision))
        self.folder.mkdir(exist_ok=True)
        names = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in names:
            self.downloaded.append(name)
            (self.folder / name).write_bytes(self.files[name])
        return str(self.folder)


JUNK = dict.fromkeys(
    ("consolidated.safetensors", "checkpoint-5/model.safetensors", "onnx/config.json", "pytorch_model.bin", "own.py"),
    b"",
) | {"flax_model.msgpack": b"", "model.fp16.safetensors": b"", "x.pt": b""}


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_of_a_hub_repository_only_what_is_read_is_downloaded(monkeypatch, tmp_path, lists, shards):
    source = write_folder(tmp_path / "source", weights_of("llama_tiny"), shards=shards)
    needed = {path.name: path.read_bytes() for path in source.iterdir()}
    hub = Hub(needed | JUNK, tmp_path / "snapshot", lists=lists)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    checkpoint = open_checkpoint("owner/small-model@v1.0")
    assert checkpoint.name == "owner/small-model@v1.0"
    assert set(hub.asked) == {("owner/small-model", "v1.0")}
    assert set(hub.downloaded) == set(needed)
    assert_same_network(checkpoint)


@pytest.mark.parametrize("lists", [True, False])
def test_pickles_of_a_hub_repository_are_downloaded_where_there_is_nothing_else(monkeypatch, tmp_path, lists):
    files = {
        "config.json": b'{"model_type": "opt"}',
        "pytorch_model.bin": b"{}",
        "tf_model.h5": b"",
        "vocab.json": b"{}",
    }
    hub = Hub(files, tmp_path / "snapshot", lists=lists)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: "):
        open_checkpoint("owner/older")
    assert hub.downloaded == ["config.json", "vocab.json", "pytorch_model.bin"]
    del files["pytorch_model.bin"]
    (tmp_path / "snapshot" / "pytorch_model.bin").unlink()
    message = "no weights in it that are read .*tf_model.h5" if lists else "neither model.safetensors nor"
    with pytest.raises(InputError, match=message):
        open_checkpoint("owner/older")


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


def test_linears_stored_as_in_out(tmp_path):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 48, "vocab_size": 256}
    config, random = sizes | {"model_type": "gpt2"}, np.random.default_rng(0)
    expected, prefix = make_network(config), "transformer."
    layers = expected.layer_shapes()
    # As the first GPT-2 was published: without a prefix, with the masks of attention.
    tensors = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.float32)),
        "h.0.attn.masked_bias": np.full((), -1e4, np.float32),
    }
    for name, shape in {k: v for part in expected.parts for k, v in expected.tensors(part).items()}.items():
        shape = shape[::-1] if name.removesuffix(".weight") in layers else shape
        tensors[name.removeprefix(prefix)] = random.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(job := prepare(small_run(tmp_path, tmp_path, method="wanda", allocation="uniform", sparsity=0.5)))
    pruned, masks = safetensors.numpy.load_file(job.path / "model/model.safetensors"), read_masks(job.path)
    assert {name: mask.shape for name, mask in masks.items()} == {k.removeprefix(prefix): v for k, v in layers.items()}
    for name, array in tensors.items():
        mask = masks.get(name.removesuffix(".weight"))
        np.testing.assert_array_equal(pruned[name], array if mask is None else np.where(mask.T, array, 0))
