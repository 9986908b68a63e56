"""Logits against `transformers` on torch, for randomly initialised models that it saves itself."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from prune_helpers import logits_of
from transformers import AutoConfig, AutoModelForCausalLM

from prune.models import make_network

COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
SIZES = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
OPT_SIZES = COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": ("llama", SIZES),
    "llama-linear": ("llama", SIZES | {"rope_parameters": LINEAR}),
    "llama-llama3": ("llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama-head-dim": ("llama", SIZES | {"head_dim": 12, "hidden_act": "gelu", "attention_bias": True}),
    "llama-gelu-tanh": ("llama", SIZES | {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True}),
    "mistral": ("mistral", SIZES | {"sliding_window": 5}),
    "mistral-full": ("mistral", SIZES | {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 12}),
    "qwen3-bias": ("qwen3", SIZES | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-windows": ("qwen3", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "opt-125m": ("opt", OPT_SIZES),
    "opt-350m": ("opt", OPT_SIZES | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-projected": ("opt", OPT_SIZES | {"word_embed_proj_dim": 16, "activation_function": "gelu_new"}),
    "opt-plain": ("opt", OPT_SIZES | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("opt", OPT_SIZES | {"_remove_final_layer_norm": True, "activation_function": "gelu"}),
    "opt-untied": ("opt", OPT_SIZES | {"tie_word_embeddings": False}),
}


def save_model(folder, model_type, settings, dtype=torch.float32):
    """A model whose every parameter is drawn, norms and biases too, saved; and read back in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    model.to(dtype).save_pretrained(folder)
    # Read back, for `.float()` would keep the rotary frequencies as rounded as the weights.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def older_form(config):
    """The same config as older versions wrote it."""
    rope = config.pop("rope_parameters", None)
    config.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype")
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    return config


def assert_logits_equal(config, folder, model):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    network = make_network(config, tensors)
    network.check({name: array.shape for name, array in tensors.items()})
    ids = np.random.default_rng(0).integers(0, 50, (2, 19), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    found = logits_of(network, tensors, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model = save_model(tmp_path, *CASES[case])
    config = json.loads((tmp_path / "config.json").read_text())
    assert_logits_equal(config, tmp_path, model)
    network = make_network(config)
    assert make_network(older_form(config)) == network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_weights(dtype, tmp_path):
    model = save_model(tmp_path, "llama", SIZES, dtype)
    assert_logits_equal(json.loads((tmp_path / "config.json").read_text()), tmp_path, model)
