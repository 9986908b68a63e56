"""Pruned models in `transformers` on torch: they load, score the same perplexity, and are as sparse."""

import contextlib
import functools
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from prune_helpers import (
    byte_level_metadata,
    byte_tokenizer,
    card_of,
    config_of,
    folder_with_tokenizer,
    gguf_metadata,
    small_run,
    weights_of,
    write_folder,
    write_gguf,
)
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune.job import prepare
from prune.output import read_masks
from prune.run import run

TEXT = "Pruning takes weights away. What is left must do the work of all: \n\n say the same, to the same people. " * 6


def bfloat16_folder(folder):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights_of("llama_tiny").items()}
    source = write_folder(folder / "bfloat16", tensors, shards=2)
    byte_tokenizer(begin=True).save_pretrained(source)
    return source


def gguf_file(folder):
    tensors = dict(weights_of("llama_tiny"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows for the tokens beyond those of bytes
        tensors[name] = np.pad(tensors[name], ((0, 4), (0, 0)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = byte_level_metadata("gpt-2", ["Ġ t"], [*alphabet, "Ġt"])
    kinds = {name: GGMLQuantizationType.Q8_0 for name in tensors if "_proj" in name}
    return write_gguf(folder / "llama.gguf", tensors, gguf_metadata(config_of("llama_tiny")) | tokenizer, kinds=kinds)


def pickled(folder, save=torch.save, names="{}".format, shards=1):
    """A folder of Torch's files, with what a training leaves beside the weights."""
    source = folder_with_tokenizer("llama_tiny_tied", folder)
    (source / "model.safetensors").unlink()
    tensors = {names(name): torch.from_numpy(array) for name, array in weights_of("llama_tiny_tied").items()}
    tensors[names("lm_head.weight")] = tensors[names("model.embed_tokens.weight")]  # tied: the same storage
    tensors[names("model.layers.0.self_attn.rotary_emb.inv_freq")] = torch.ones(12)
    save({"step": torch.tensor(3)}, source / "optimizer.pt")
    if shards == 1:
        save(tensors, source / "pytorch_model.bin")
        return source
    weight_map = {}
    for number in range(shards):
        filename = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save(part, source / filename)
        weight_map |= dict.fromkeys(part, filename)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


SOURCES = {
    "pickle": pickled,
    "pickle-shards": functools.partial(pickled, shards=2),
    "pickle-compiled": functools.partial(pickled, save=legacy, names="_orig_mod.{}".format),
    "llama": lambda folder: folder_with_tokenizer("llama_tiny", folder),
    "llama-tied": lambda folder: folder_with_tokenizer("llama_tiny_tied", folder),
    "llama-bfloat16": bfloat16_folder,
    "llama-gguf": gguf_file,
    "opt": lambda folder: folder_with_tokenizer("opt_tiny", folder),
}


def read_by_vllm(folder):
    """Every safetensors file of a folder, less those that an index does not name."""
    paths, index = list(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not index.is_file():
        return paths
    named = set(json.loads(index.read_text())["weight_map"].values())
    return [path for path in paths if path.name in named]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"method": "wanda", "allocation": "farms"}),
        ("llama-tied", {"method": "magnitude", "allocation": "atp"}),
        ("llama-bfloat16", {"method": "wanda", "allocation": "uniform", "groups": "2:4"}),
        ("llama-gguf", {"method": "magnitude", "allocation": "alphapruning"}),
        ("pickle", {"method": "magnitude", "allocation": "uniform"}),
        ("pickle-shards", {"method": "magnitude", "allocation": "uniform"}),
        ("pickle-compiled", {"method": "magnitude", "allocation": "uniform"}),
        ("opt", {"method": "wanda", "allocation": "owl", "groups": "4:8", "sparsity": 0.45}),
    ],
)
def test_export_scores_the_same_on_torch(name, settings, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config = small_run(tmp_path, SOURCES[name](tmp_path), text=str(text), calibration=str(text), **settings)
    job = prepare(config)
    run(job)
    card = card_of(job.path)

    tokenizer = AutoTokenizer.from_pretrained(job.path / "model")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 40 * 40].reshape(-1, 40)
    assert hashlib.sha256(blocks.numpy().astype("<i4").tobytes()).hexdigest() == card["evaluation"]["ids_sha256"]
    assert (ids[0] == tokenizer.bos_token_id) == (name == "llama-bfloat16")

    model = AutoModelForCausalLM.from_pretrained(job.path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(block[None], labels=block[None]).loss) for block in blocks]
    assert np.exp(np.mean(losses)) == pytest.approx(card["perplexity"]["pruned"], rel=1e-4)
    np.testing.assert_allclose(losses, card["nll_per_block"]["pruned"], rtol=1e-4)
    assert card["perplexity"]["pruned"] != pytest.approx(card["perplexity"]["dense"], rel=1e-3)

    assert {"llama-gguf": "float16", "llama-bfloat16": "bfloat16"}.get(name, "float32") == card["dtype"]["written"]
    if name == "llama-gguf":  # whose config is made anew; that of a folder says what it said
        assert AutoModelForCausalLM.from_pretrained(job.path / "model", dtype="auto").dtype == torch.float16

    by_vllm, by_llama_cpp = read_by_vllm(job.path / "model"), list((job.path / "model").glob("model*.safetensors"))
    assert sorted(by_vllm) == sorted(by_llama_cpp)
    with contextlib.ExitStack() as stack:
        names = [name for path in by_vllm for name in stack.enter_context(safe_open(path, "pt")).keys()]  # noqa: SIM118
    assert len(names) == len(set(names)) and set(names) <= set(model.state_dict())

    modules, masks = dict(model.named_modules()), read_masks(job.path)
    assert set(masks) == {row["layer"] for row in card["allocation"]["layers"]}
    for layer, mask in masks.items():
        np.testing.assert_array_equal(modules[layer].weight.detach().numpy() != 0, mask, err_msg=layer)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values())
    assert 1 - kept == pytest.approx(card["sparsity"]["reached"])
    assert card["sparsity"]["reached"] == pytest.approx(card["sparsity"]["asked"], abs=0.02)
