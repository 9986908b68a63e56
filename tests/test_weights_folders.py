"""Folders as the hub, diffusers and transformers leave them: which files are the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from farms_jax.errors import InputError, LeftOutWarning
from farms_jax.programs.cache import Cache, default_folder
from farms_jax.weights import open_weights
from farms_jax.weights.folders import unfinished


def save(path, **tensors):
    """Write matrices of one value each; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({name: np.full((2, 3), value, np.float32) for name, value in tensors.items()}, path)
    return path


def read(path):
    """The value of every tensor."""
    with open_weights(path) as source:
        return {name: float(source.read(name)[0, 0]) for name in source.tensors}


@pytest.mark.parametrize(
    ("chosen", "others"),
    [
        (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.fp16.safetensors"]),
        (["unet.safetensors"], ["unet.non_ema.safetensors", "unet.fp16.safetensors", "adapter_model.safetensors"]),
        (["model.safetensors"], ["model.fp16-00001-of-00001.safetensors", "consolidated.safetensors"]),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
            ["model-1-of-2.fp16.safetensors", "v1.5.safetensors"],
        ),
        (["model.fp16.safetensors"], []),
    ],
)
def test_variants_and_other_files_beside_a_model_are_not_read(tmp_path, chosen, others):
    for number, name in enumerate(chosen):
        save(tmp_path / name, **{f"layer{number}": number})
    for name in others:
        save(tmp_path / name, layer0=100, other=100)
    assert read(tmp_path) == {f"layer{number}": number for number in range(len(chosen))}


def test_other_models_of_a_folder_are_told(tmp_path, recwarn):
    """Not variants of the same model, its other formats, and what belongs to a training."""
    save(tmp_path / "unet.safetensors", w=1)
    for name in ("unet.fp16.safetensors", "adapter_model.safetensors", "optimizer.npz", "flax_model.msgpack"):
        (tmp_path / name).write_bytes((tmp_path / "unet.safetensors").read_bytes())
    (tmp_path / "training_args.bin").touch()
    assert (read(tmp_path), [*recwarn]) == ({"w": 1}, [])
    (tmp_path / "vae.npz").touch()
    (tmp_path / "best.pt").touch()
    with pytest.warns(LeftOutWarning, match="unet.safetensors is read, and not vae.npz, best.pt beside it; give one"):
        assert read(tmp_path) == {"w": 1}


def test_modules_beside_a_sentence_transformer_are_told(tmp_path):
    save(tmp_path / "model.safetensors", w=1)
    save(tmp_path / "2_Dense" / "model.safetensors", **{"linear.weight": 2})
    (tmp_path / "1_Pooling").mkdir()
    modules = [{"idx": number, "path": path} for number, path in enumerate(("", "1_Pooling", "2_Dense", "../up"))]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.warns(LeftOutWarning, match=r"weights of this model are in 2_Dense too, .* give .*/2_Dense to measure"):
        assert read(tmp_path) == {"w": 1}


def test_shards_are_read_whatever_their_index_leaves_out_or_adds(tmp_path):
    shards = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    for number, name in enumerate(shards):
        save(tmp_path / name, **{f"layer{number}": number, "twice": number, f"mtp{number}": 5})
    save(tmp_path / "consolidated.safetensors", other=100)
    index = {"layer0": shards[0], "layer1": shards[0], "twice": shards[1], "gone": shards[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors.index.fp16.json").write_text("{}")
    with pytest.warns(LeftOutWarning, match=r"index.json: no shard has gone, which it names"):
        assert read(tmp_path) == {"layer0": 0, "layer1": 1, "mtp0": 5, "mtp1": 5, "twice": 1}
    (tmp_path / shards[1]).unlink()
    with pytest.raises(InputError, match=r"model-2-of-2.safetensors: this shard is missing"):
        open_weights(tmp_path)


@pytest.fixture
def cached(tmp_path):
    """A folder of the hub's cache with two snapshots, of which the first is that of main."""
    cache = tmp_path / "models--somebody--a-model"
    for number, commit in enumerate(["b" * 40, "a" * 40]):
        blob = save(cache / "blobs" / commit[:8], w=number)
        (folder := cache / "snapshots" / commit).mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    return cache


def test_the_hubs_cache(cached, monkeypatch):
    assert open_weights(cached).name == open_weights(cached / "snapshots" / ("a" * 40)).name == "somebody/a-model"
    assert [read(cached), read(cached / "snapshots" / ("a" * 40))] == [{"w": 0}, {"w": 1}]
    monkeypatch.chdir(cached)
    assert read(".") == {"w": 0}
    with pytest.raises(InputError, match="in its folders models--somebody--a-model; give one"):
        open_weights(cached.parent)
    (cached / "refs" / "main").unlink()
    with pytest.raises(InputError, match=r"several snapshots \(aaa.*, bbb.*give the folder of one"):
        open_weights(cached)


def test_a_download_that_has_not_ended_says_so(cached, tmp_path):
    (cached / "blobs" / "bbbbbbbb").rename(cached / "blobs" / "bbbbbbbb.incomplete")
    with pytest.raises(InputError, match="model.safetensors.*not come to its end: give the same hf download"):
        open_weights(cached)
    (place := tmp_path / "local" / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (place / "x.incomplete").touch()
    with pytest.raises(InputError, match="no weights in it.*not come to its end"):
        open_weights(tmp_path / "local")
    assert not unfinished(Path("/"))  # above which there is nothing
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match="no snapshot; hf download a/b"):
        open_weights(tmp_path / "models--a--b")


def test_a_user_whom_nobody_knows_has_no_files():
    with pytest.raises(InputError, match="~no-such-user/model.safetensors: no such file"):
        open_weights("~no-such-user/model.safetensors")


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="below: results cannot be kept there"):
        cache.put("key", {"alpha": 2})
    cache.put("key", {"alpha": 2})  # told once
    assert cache.get("key") is None


def test_a_user_without_a_home_keeps_no_results(monkeypatch):
    def unknown():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", unknown)
    with pytest.warns(UserWarning, match="no home folder"):
        assert default_folder() is None
