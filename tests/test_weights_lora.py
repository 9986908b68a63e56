"""A model with a LoRA adapter has the weights that PEFT's merge gives, by its formula in float64."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from farms_jax.errors import InputError
from farms_jax.weights import LoraSource, is_lora, open_weights

BASE = {
    "model.layers.0.q.weight": (12, 8),
    "model.layers.0.q.bias": (12,),
    "model.layers.1.q.weight": (12, 8),
    "model.embed.weight": (20, 8),
    "model.conv.weight": (6, 4, 3, 3),
    "head.weight": (20, 8),
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "somebody/model"}
Q = "base_model.model.model.layers.0.q"
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def linear(rank=2, rows=12, cols=8, module=Q):
    return {f"{module}.lora_A.weight": normal(rank, cols), f"{module}.lora_B.weight": normal(rows, rank)}


def make(folder, adapter, config=None, base=None):
    """Return a base, its arrays, and the folder of an adapter."""
    arrays = {name: normal(*shape).astype(ml_dtypes.bfloat16) for name, shape in (base or BASE).items()}
    (folder / "adapter").mkdir()
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    safetensors.numpy.save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    return open_weights(folder / "model.safetensors"), arrays, folder / "adapter"


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 2, 3),
        ({"use_rslora": True}, 2, 6 / math.sqrt(2)),
        ({"rank_pattern": {"q": 3}}, 3, 2),
        ({"alpha_pattern": {"k": 1, r"layers\.0\.q": 5, "q": 7}}, 2, 2.5),
        ({"alpha_pattern": {"r": 1}}, 2, 3),  # not the end of another name
    ],
)
def test_a_linear_layer(tmp_path, config, rank, scale):
    adapter = linear(rank)
    base, arrays, folder = make(tmp_path, adapter, config)
    assert is_lora(folder) and is_lora(str(folder)) and not is_lora(tmp_path)
    a, b = (array.astype(np.float64) for array in adapter.values())
    name = "model.layers.0.q.weight"
    with LoraSource(base, folder) as source:
        assert source.name == "model + adapter"
        assert (source.format, source.axes) == (base.format, base.axes)
        assert source.tensors[name].dtype == source.read(name).dtype == np.float32
        expected = arrays[name].astype(np.float64) + scale * b @ a
        np.testing.assert_allclose(source.read(name), expected, rtol=1e-6, atol=1e-6)
        for other in source.tensors.keys() - {name}:
            assert source.tensors[other] == base.tensors[other]
            np.testing.assert_array_equal(source.read(other), arrays[other])


def test_kernels_embeddings_and_replaced_layers(tmp_path):
    parts = {
        "model.conv.lora_A.weight": normal(2, 4, 3, 3),
        "model.conv.lora_B.weight": normal(6, 2, 1, 1),
        "model.embed.lora_embedding_A": normal(2, 20),
        "model.embed.lora_embedding_B": normal(8, 2),
        "model.embed.base_layer.weight": normal(20, 8),  # replaced, and added to
        "head.weight": normal(20, 8),
    }
    base, arrays, folder = make(tmp_path, {f"base_model.model.{name}": array for name, array in parts.items()})
    conv = np.einsum("orij,rchw->ochw", parts["model.conv.lora_B.weight"], parts["model.conv.lora_A.weight"])
    embed = (parts["model.embed.lora_embedding_B"] @ parts["model.embed.lora_embedding_A"]).T
    expected = {
        "model.conv.weight": arrays["model.conv.weight"].astype(np.float32) + 3 * conv,
        "model.embed.weight": parts["model.embed.base_layer.weight"] + 3 * embed,
        "head.weight": parts["head.weight"],
    }
    with LoraSource(base, folder) as source:
        for name, array in expected.items():
            np.testing.assert_allclose(source.read(name), array, rtol=1e-5, atol=1e-5)


def test_linear_layers_that_are_kept_transposed(tmp_path):
    adapter = linear(rows=24, module="base_model.model.transformer.h.0.attn")
    base, arrays, folder = make(tmp_path, adapter, {"fan_in_fan_out": True}, {"h.0.attn.weight": (8, 24)})
    a, b = adapter.values()
    with LoraSource(base, folder) as source:
        expected = arrays["h.0.attn.weight"].astype(np.float32) + 3 * (b @ a).T
        np.testing.assert_allclose(source.read("h.0.attn.weight"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "config", "message"),
    [
        (linear(), {"peft_type": "IA3"}, "adapter_config.json: an adapter of the kind IA3.*merge"),
        (linear(), {"use_dora": True}, "DoRA.*merge"),
        (linear(), {"lora_alpha": None}, "lora_alpha"),
        (linear(), {"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        (linear(), {"alpha_pattern": {"q": "much"}}, "alpha_pattern"),
        (linear(), {"alpha_pattern": [3]}, "alpha_pattern"),
        (linear(), {"alpha_pattern": {"(?i)q": 3}}, "alpha_pattern"),  # a pattern alone, but not as the end of a name
        (linear(), {"alpha_pattern": {"q{99999999999}": 3}}, "alpha_pattern"),
        (linear(), {"lora_alpha": math.nan}, "lora_alpha"),
        (linear(), {"lora_alpha": 10**400}, "lora_alpha .* an integer of 1329 bits"),
        (linear(rank=0), {}, r"lora_A.weight \(0, 8\) does not fit"),
        (linear(cols=9), {}, r"lora_A.weight \(2, 9\) does not fit model.layers.0.q.weight \(12, 8\).*somebody/model"),
        (linear(module="base_model.model.k"), {}, "changes k.weight, which .* does not have.*somebody/model"),
        (linear(module="base_model.model.q"), {}, "changes q.weight, which"),  # there are two
        ({f"{Q}.lora_A.weight": normal(2, 8)}, {}, "only one of A and B"),
        (linear() | {f"{Q}.lora_B.bias": normal(12)}, {}, "lora_B.bias is of a variant"),
        (linear() | {f"{Q}.bias": normal(9)}, {}, r"q.bias \(9,\) does not fit"),
        ({f"{Q}.lora_A.weight": normal(), f"{Q}.lora_B.weight": normal()}, {}, "does not fit"),
        ({f"{Q}.lora_A.weight": normal(2, 8), f"{Q}.lora_B.weight": normal(12, 3)}, {}, "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_clear_error(tmp_path, adapter, config, message):
    base, _, folder = make(tmp_path, adapter, config)
    with pytest.raises(InputError, match=message) as caught:
        LoraSource(base, folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_pickled_adapter_is_never_loaded(tmp_path):
    base, _, folder = make(tmp_path, linear())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="never loaded.*safe_serialization"):
        LoraSource(base, folder)
