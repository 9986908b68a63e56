"""GGUF files: tensors, config and tokenizer against files written by the `gguf` package."""

import math
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from prune_helpers import (
    HEAD_SIZES,
    TEXT,
    byte_level_metadata,
    config_of,
    gguf_metadata,
    interleave_heads,
    trained_tokenizer,
    weights_of,
    write_gguf,
    written_back,
)
from tokenizers import pre_tokenizers
from transformers import AutoConfig

from farms_jax.errors import InputError
from prune.checkpoints import open_checkpoint, open_tokenizer
from prune.checkpoints.gguf_tokenizer import make_tokenizer
from prune.models import make_network


def gguf_of(path, name="llama_tiny", changes=(), **settings):
    """A GGUF file of a fixture; `changes` to its metadata, None to leave a key out."""
    config = config_of(name)
    metadata = gguf_metadata(config, settings.get("architecture", "llama")) | dict(changes)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, settings.pop("tensors", weights_of(name)), metadata, heads=heads, **settings)


def opened(folder, *arguments, **settings):
    """The checkpoint of such a file."""
    return open_checkpoint(str(gguf_of(folder / "small.gguf", *arguments, **settings)))


def assert_tensors(checkpoint, tensors):
    """The checkpoint has these tensors, in float32, and they are those of its network."""
    assert checkpoint.tensors == {name: (np.dtype(np.float32), array.shape) for name, array in tensors.items()}
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)
    checkpoint.network()


@pytest.mark.parametrize("name", ["llama_tiny_tied", "llama_tiny_bias"])
@pytest.mark.parametrize("per_block", [False, True])  # numbers of heads, once or for each block
def test_float32_tensors_come_back_exactly_under_their_names(tmp_path, name, per_block):
    config = config_of(name)
    heads = {"head_count": config["num_attention_heads"], "head_count_kv": config["num_key_value_heads"]}
    changes = {f"llama.attention.{key}": [count] * 4 for key, count in heads.items()} if per_block else {}
    checkpoint = opened(tmp_path, name, changes)
    assert checkpoint.name == "small"
    assert_tensors(checkpoint, weights_of(name))
    assert [checkpoint.config[key] for key in ("architectures", "model_type")] == [["LlamaForCausalLM"], "llama"]
    assert checkpoint.network() == make_network(config)


def test_query_rows_are_really_interleaved_in_the_file():
    # Two heads of size 4: llama.cpp's order is 0, 2, 1, 3 in each.
    np.testing.assert_array_equal(interleave_heads(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_quantised_tensors_are_dequantised(tmp_path, kind):
    tensors = weights_of("llama_tiny")
    kinds = {name: kind for name, array in tensors.items() if array.ndim == 2}
    checkpoint = opened(tmp_path, kinds=kinds)
    for name, array in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        if name not in kinds:
            np.testing.assert_array_equal(found, array)
            continue
        # Rows are quantised each for itself, so their order does not matter.
        np.testing.assert_array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind))
        assert np.linalg.norm(found - array) < 0.15 * np.linalg.norm(array)  # a wrong order of rows gives about 1.4


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_keep_their_rows(tmp_path, architecture):
    rng = np.random.default_rng(0)
    sizes = {
        "qwen2": {"q_proj.bias": 96, "k_proj.bias": 48, "v_proj.bias": 48},
        "qwen3": {"q_norm.weight": 24, "k_norm.weight": 24},
    }[architecture]
    tensors = weights_of("llama_tiny")
    for block in range(4):
        for name, size in sizes.items():
            tensors[f"model.layers.{block}.self_attn.{name}"] = rng.normal(size=size).astype(np.float32)
    checkpoint = opened(tmp_path, architecture=architecture, tensors=tensors)
    assert checkpoint.config["model_type"] == architecture
    assert_tensors(checkpoint, tensors)


def llama3_factors(scaling, theta, head_dim):
    """Divisors of the frequencies, as LLaMA 3.1 defines them: by wave lengths, one by one."""
    original, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for feature in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (feature / head_dim)
        smooth = (original / wave - low) / (high - low)
        if wave > original / low:
            factors.append(scaling["factor"])
        elif wave < original / high:
            factors.append(1.0)
        else:
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("factor", "original", "head_dim", "theta"),
    [(8.0, 64, 24, 10000.0), (8.0, 8192, 128, 500000.0), (32.0, 8192, 64, 500000.0)],
)
def test_llama3_scaling_is_found_from_the_factors(tmp_path, factor, original, head_dim, theta):
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    changes = {"llama.rope.freq_base": theta, **{f"llama.{key}": head_dim for key in HEAD_SIZES}}
    factors = llama3_factors(scaling, theta, head_dim)
    checkpoint = opened(tmp_path, changes=changes, extra={"rope_freqs.weight": factors})
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    assert "rope_freqs.weight" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"model_type": "llama", "rope_scaling": None}),
        ({"llama.rope.scaling.type": "none"}, {"rope_scaling": None}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"llama.attention.sliding_window": 64}, {"model_type": "mistral", "sliding_window": 64}),
    ],
)
def test_the_config_is_read(tmp_path, changes, expected):
    config = opened(tmp_path, changes=changes).config
    assert {key: config[key] for key in expected} == expected
    # The shortest decimal of its float32; stored is 9.999999747378752e-06.
    assert repr(config["rms_norm_eps"]) == "1e-05"


def test_export_is_one_float32_file_that_opens_as_a_folder(tmp_path):
    _, merges, tokens = trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    changes = {"llama.rope.freq_base": 50000.0} | byte_level_metadata("gpt-2", merges, tokens)
    source = opened(tmp_path, changes=changes)
    source.copy_sidecars(tmp_path / "export")
    [(filename, content)] = written_back(source).items()
    (tmp_path / "export" / filename).write_bytes(content)
    copy = open_checkpoint(str(tmp_path / "export"))
    assert copy.config == source.config
    assert_tensors(copy, weights_of("llama_tiny"))
    assert copy.tokenizer()(TEXT)["input_ids"] == source.tokenizer()(TEXT)["input_ids"]
    theirs = AutoConfig.from_pretrained(tmp_path / "export")
    assert theirs.rope_parameters["rope_theta"] == 50000.0
    assert (theirs.head_dim, theirs.rms_norm_eps, theirs.num_key_value_heads) == (24, 1e-5, 2)


def test_a_given_tokenizer_is_saved_instead(tmp_path):
    source = opened(tmp_path, changes=byte_level_metadata("of another world"))
    other = make_tokenizer(byte_level_metadata("gpt-2"), "made")
    source.copy_sidecars(tmp_path / "export", other)
    assert open_tokenizer(str(tmp_path / "export"))(TEXT)["input_ids"] == other(TEXT)["input_ids"]
    with pytest.raises(InputError, match="--tokenizer PATH"):
        source.copy_sidecars(tmp_path / "export")


def test_reading_takes_the_memory_of_one_tensor(tmp_path):
    name = "model.embed_tokens.weight"
    big = np.random.default_rng(0).standard_normal((8192, 1024), np.float32)  # 32 MiB
    checkpoint = opened(tmp_path, tensors=weights_of("llama_tiny") | {name: big}, kinds={name: Kind.Q8_0})
    tracemalloc.start()
    found = checkpoint.read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < found.nbytes + (72 << 20)  # a piece of 4 Mi weights, in a few copies
    np.testing.assert_array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(big, Kind.Q8_0), Kind.Q8_0))


EPSILON = "llama.attention.layer_norm_rms_epsilon"


def factors(*values):
    return {"rope_freqs.weight": np.array(values, np.float32)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra": {"blk.0.attn_qkv.weight": np.zeros((2, 2), np.float32)}}, "unknown tensors for llama: .*attn_qkv"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.zeros(24, np.float32)}}, "unknown tensors for llama: .*q_norm"),
        ({"extra": factors(*np.linspace(1, 3, 12))}, "rope_freqs.weight is of no known rotary scaling"),
        ({"extra": factors(1, 1, 1, 1, 1)}, r"rope_freqs.weight has shape \(5,\), not \(12,\)"),
        ({"extra": factors(*[np.nan] * 12)}, "no known rotary scaling"),
        ({"extra": factors(1.5, *[np.inf] * 11)}, "no known rotary scaling"),
        ({"changes": {EPSILON: math.inf}}, "epsilon is inf, no number > 0"),
        ({"changes": {EPSILON: 1e-45}}, "no number > 0"),
        ({"extra": {"token_types": np.zeros(5, np.int32)}}, "unknown tensors for llama: token_types"),
        ({"changes": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling 'yarn' is not supported"),
        ({"changes": {"llama.rope.dimension_count": 12}}, "rope.dimension_count is not the head size 24"),
        ({"changes": {"llama.block_count": None}}, "its metadata has no llama.block_count"),
        ({"changes": {"llama.attention.head_count": [4, 2, 4, 4]}}, r"is \[4, 2, 4, 4\], no number > 0 for all"),
        ({"changes": {"llama.rope.freq_base": "high"}}, "rope.freq_base is 'high', no number > 0"),
        ({"changes": {"llama.expert_count": 8}}, "llama.expert_count is not supported"),
        ({"changes": {"llama.logit_scale": 0.5}}, "llama.logit_scale is not supported"),
        ({"changes": {"split.count": 2}}, "one part of a split model.*merge"),
        ({"changes": {"general.alignment": 0}}, "general.alignment 0"),
        ({"architecture": "mamba"}, "unknown architecture 'mamba'; known are llama, qwen2, qwen3"),
    ],
)
def test_what_is_not_supported_is_one_clear_error(tmp_path, settings, message):
    with pytest.raises(InputError, match=f"{tmp_path}/small.gguf.*{message}"):
        opened(tmp_path, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:4] + b"\1\0\0\0" + content[8:], "GGUF version 1 is not known"),
        (lambda content: content[:-100], "goes past the end of the file: truncated; download it again"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, change, message):
    path = gguf_of(tmp_path / "small.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=f"{path}.*{message}"):
        open_checkpoint(str(path))
