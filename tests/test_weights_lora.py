"""A model with a LoRA adapter has the weights that PEFT's merge gives, by its formula in float64."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from farms_jax.diagnosis import diagnose
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
TOKENS = "base_model.model.model.embed.token_adapter.trainable_tokens_delta"
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
        (linear(), {"peft_type": "PREFIX_TUNING"}, "adds inputs and changes no weight; give the model .* alone"),
        (linear(), {"peft_type": "XLORA"}, "changes weights by the input; give the model"),
        (linear(), {"alora_invocation_tokens": [1]}, "after its invocation tokens alone, so .* no weights of its own"),
        (linear(), {"layer_replication": [[0, 2]]}, "repeats layers of the model.*layer_replication.*merge"),
        (linear(), {"use_qalora": True}, "QA-LoRA.*merge"),
        (linear(), {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the model's weights before.*merge"),
        (linear(), {"init_lora_weights": [1]}, "init_lora_weights .1. changed"),
        (linear(), {"use_dora": True}, "no lengths .DoRA. of model.layers.0.q"),
        (linear() | {f"{Q}.lora_magnitude_vector": normal(9)}, {}, r"lora_A.weight \(2, 8\) does not fit"),
        (linear(), {"target_parameters": "q"}, "target_parameters 'q' is no list of names"),
        (linear(), {"trainable_token_indices": {"embed": 3}}, "trainable_token_indices .* no lists of rows"),
        (
            {TOKENS: normal(2, 8)},
            {"trainable_token_indices": [1, 99]},
            "tokens_delta .* does not fit model.embed.weight",
        ),
        ({TOKENS: normal(2, 8)}, {"trainable_token_indices": {"head": [1, 2]}}, "tokens_delta .* does not fit"),
        (linear() | {f"{Q}.lora_C.weight": normal(3)}, {}, "lora_C.weight is of a variant"),
        (linear() | {f"{Q}.lora_B.bias": normal(9)}, {}, r"lora_B.bias \(9,\) does not fit"),
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


def merged(weight, adapter, scale=3.0, *, transposed=False):
    """The product added in float64, and with magnitudes the rows of that length; weights are (out, ...)."""
    a, b, *magnitude = (array.astype(np.float64) for array in adapter.values())
    weight = weight.astype(np.float64).T if transposed else weight.astype(np.float64)
    rows = weight.reshape(len(weight), -1) + scale * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    if magnitude:
        rows *= magnitude[0].reshape(-1, 1) / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows.reshape(weight.shape)
    return rows.T if transposed else rows


def check(base, folder, expected):
    with LoraSource(base, folder) as source:
        for name, array in expected.items():
            assert source.tensors[name] == (np.float32, array.shape)
            np.testing.assert_allclose(source.read(name), array, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("start", "transposed"), [("pissa", False), ("pissa", True), ("olora", False), ("OLoRA", False)]
)
def test_what_the_first_factors_took_off_the_model(tmp_path, start, transposed):
    name = "model.layers.0.q.weight"
    adapter = linear()
    shapes = {name: (8, 12)} if transposed else None
    base, arrays, folder = make(tmp_path, adapter, {"init_lora_weights": start, "fan_in_fan_out": transposed}, shapes)
    weight = arrays[name].astype(np.float64)
    if start == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        first = left[:, :2] * values[:2] @ right[:2]
    else:
        q, r = np.linalg.qr(weight)
        first = 3 * q[:, :2] @ r[:2]
    check(base, folder, {name: merged(weight - first, adapter, transposed=transposed)})


def test_dora_gives_rows_the_length_that_they_learned(tmp_path):
    layers = {
        "model.layers.0.q": linear() | {f"{Q}.lora_magnitude_vector": normal(12)},
        "model.conv": {
            "base_model.model.model.conv.lora_A.weight": normal(2, 4, 3, 3),
            "base_model.model.model.conv.lora_B.weight": normal(6, 2, 1, 1),
            "base_model.model.model.conv.lora_magnitude_vector": normal(1, 6, 1, 1),
        },
        "model.embed": {
            "base_model.model.model.embed.lora_embedding_A": normal(2, 20),
            "base_model.model.model.embed.lora_embedding_B": normal(8, 2),
            "base_model.model.model.embed.lora_magnitude_vector": normal(8),
        },
    }
    adapter = {name: array for layer in layers.values() for name, array in layer.items()}
    base, arrays, folder = make(tmp_path, adapter, {"use_dora": True})
    expected = {
        f"{module}.weight": merged(arrays[f"{module}.weight"], layer, transposed="embed" in module)
        for module, layer in layers.items()
    }
    check(base, folder, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_with_the_sides_of_their_inputs_told_by_the_shapes(tmp_path, transposed):
    module = "base_model.model.model.experts"
    adapter = {  # of 3 experts, rank 2; the inner of two wrappers is the first parameter
        f"{module}.base_layer.lora_A.weight": normal(6, 5),
        f"{module}.base_layer.lora_B.weight": normal(10, 6),
        f"{module}.lora_A.weight": normal(6, 5),
        f"{module}.lora_B.weight": normal(5, 6),
    }
    up, down = ((3, 5, 10), (3, 5, 5)) if transposed else ((3, 10, 5), (3, 5, 5))
    config = {"target_parameters": ["experts.up", "experts.down"], "alpha_pattern": {"experts.down": 4}}
    base, arrays, folder = make(tmp_path, adapter, config, {"model.experts.up": up, "model.experts.down": down})
    expected = {}
    for name, a, b, scale in (("up", *list(adapter.values())[:2], 3), ("down", *list(adapter.values())[2:], 2)):
        products = [b[:, e::3].astype(float) @ a[2 * e : 2 * e + 2] for e in range(3)]
        weight = arrays[f"model.experts.{name}"].astype(float)
        stack = np.stack([product.T if transposed else product for product in products])
        expected[f"model.experts.{name}"] = weight + scale * stack
    check(base, folder, expected)


def test_a_square_stack_alone_does_not_tell_its_sides(tmp_path):
    adapter = linear(rank=6, rows=5, cols=5, module="base_model.model.experts")
    config = {"target_parameters": ["experts.down"]}
    base, _, folder = make(tmp_path, adapter, config, {"experts.down": (3, 5, 5)})
    with pytest.raises(InputError, match="which axis of experts.down has the inputs.*merge"):
        LoraSource(base, folder)


def test_experts_that_the_model_has_one_by_one(tmp_path):
    adapter = linear(module="base_model.model.mlp.experts")
    config = {"target_parameters": ["experts.down"]}
    base, _, folder = make(tmp_path, adapter, config, {"mlp.experts.0.down.weight": (5, 4)})
    with pytest.raises(InputError, match="changes arrays of mlp.experts, which .* does not have.*merge"):
        LoraSource(base, folder)


def test_square_layers_are_kept_as_the_others_whatever_the_last_one_left_in_the_config(tmp_path):
    module = "base_model.model.h.0"
    first, second = linear(rows=24, module=f"{module}.attn"), linear(rows=8, module=f"{module}.proj")
    shapes = {"h.0.attn.weight": (8, 24), "h.0.proj.weight": (8, 8)}
    base, arrays, folder = make(tmp_path, first | second, {"fan_in_fan_out": False}, shapes)
    pairs = zip(arrays.items(), (first, second), strict=True)
    check(base, folder, {name: merged(weight, layer, transposed=True) for (name, weight), layer in pairs})


def test_tokens_biases_heads_and_names_of_wrapped_models(tmp_path):
    adapter = linear()
    more = {
        f"{Q}.lora_B.bias": normal(12),
        TOKENS: normal(2, 8),
        "base_model.model.head.modules_to_save.weight": normal(23, 8),  # of a vocabulary that grew
        "base_model.model.score.weight": normal(3, 8),  # new
    }
    wrapped = {
        name.replace("model.layers", "model._orig_mod.layers"): array for name, array in (adapter | more).items()
    }
    config = {"lora_bias": True, "trainable_token_indices": {"embed": [4, 1]}, "modules_to_save": ["head", "score"]}
    base, arrays, folder = make(tmp_path, wrapped, config, {f"module.{name}": shape for name, shape in BASE.items()})
    embedding = arrays["module.model.embed.weight"].astype(float)
    embedding[[4, 1]] = more[TOKENS]
    bias = arrays["module.model.layers.0.q.bias"].astype(float) + 3 * more[f"{Q}.lora_B.bias"]
    name = "module.model.layers.0.q.weight"
    expected = {name: merged(arrays[name], adapter), "module.model.layers.0.q.bias": bias}
    expected |= {"module.model.embed.weight": embedding, "module.head.weight": more[list(more)[2]]}
    check(base, folder, expected | {"score.weight": more["base_model.model.score.weight"]})


def test_a_model_beside_the_config_of_an_adapter_is_a_model(tmp_path):
    base, arrays, folder = make(tmp_path, linear())
    assert is_lora(folder / "adapter_model.safetensors")
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(
            InputError, match="an adapter .LoRA or the like., which is no model by itself; farms compare"
        ):
            open_weights(path)
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    assert not is_lora(folder)
    assert open_weights(folder).tensors.keys() == arrays.keys()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors: no such file"):
        LoraSource(base, folder)


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
        ("q.lora_embedding_A.default", "q.lora_embedding_B.default"),
        ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
        ("unet.attn.processor.to_q_lora.down.weight", "unet.attn.processor.to_q_lora.up.weight"),
        ("blocks/q/kernel_lora_a", "blocks/q/kernel_lora_b"),
        ("blocks/q/lora/a", "blocks/q/lora/b"),
        ("q.hada_w1_a", "q.hada_w1_b"),
        ("q.lokr_w1", "q.lokr_w2"),
    ],
)
def test_factors_of_adapters_are_no_layers(names):
    draw = np.random.default_rng(0).normal
    factors = {names[0]: draw(size=(8, 24)), names[1]: draw(size=(24, 8))}
    settings = {"resamples": 0, "randomize": False}
    with pytest.raises(InputError, match="an adapter .* merge it into its model"):
        diagnose(factors, **settings)
    # A weight without its partner is a weight, whatever its name.
    weights = {"up": {"kernel": draw(size=(24, 32))}, "x.lora_A.weight": draw(size=(24, 32))}
    diagnosis = diagnose(weights | factors, **settings)
    assert set(diagnosis.names) == {"up/kernel", "x.lora_A.weight"}
    assert all("part of an adapter" in dict(diagnosis.left_out)[name] for name in names)
    assert set(diagnose(weights | factors, include=names, **settings).names) == set(names)
