"""Logits against `transformers` on torch, for randomly initialised models that it saves itself."""

import functools
import json

import numpy as np
import pytest
import torch
from prune_helpers import logits_of, small_run, state_of
from transformers import AutoConfig, AutoModelForCausalLM

from prune.checkpoints import open_checkpoint
from prune.forward import apply_embed
from prune.job import prepare
from prune.models import make_network
from prune.output import read_masks
from prune.run import run

COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
SIZES = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
OPT_SIZES = COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}
GEMMA = {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20}
NEOX = COMMON | {"intermediate_size": 48}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
    "beta_fast": 3.0,
    "beta_slow": 0.1,
}
YARN_MORE = {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.5}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0]}
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
    "llama-dynamic": ("llama", SIZES | {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "qwen2-yarn": ("qwen2", SIZES | {"rope_parameters": YARN}),
    "qwen3-yarn": ("qwen3", SIZES | {"head_dim": 16, "rope_parameters": YARN | YARN_MORE}),
    "phi3": ("phi3", SIZES),
    "phi3-windows": ("phi3", SIZES | {"sliding_window": 5, "partial_rotary_factor": 0.5}),
    "phi3-long": ("phi3", SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-short": ("phi3", SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2": ("gemma2", SIZES | GEMMA),
    "gemma2-plain": ("gemma2", SIZES | GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", SIZES | GEMMA),
    "gemma3-scaled": (
        "gemma3_text",
        SIZES
        | GEMMA
        | {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 77.0}},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("smollm3", SIZES | {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "smollm3-windows": (
        "smollm3",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [0, 1, 0], "attention_bias": True},
    ),
    "olmo2": ("olmo2", SIZES),
    "olmo2-bias": ("olmo2", SIZES | {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", NEOX | {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "gpt2": ("gpt2", COMMON),
    "gpt2-scaled": (
        "gpt2",
        COMMON | {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
    "falcon-7b": ("falcon", COMMON),
    "falcon-40b": ("falcon", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("falcon", COMMON | {"multi_query": False, "parallel_attn": False, "bias": True}),
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
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, pad_token_id=None, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            # Norms: input_layernorm, ln_1.
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    model.to(dtype).save_pretrained(folder)
    # Read back, for `.float()` would keep the rotary frequencies as rounded as the weights.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def older_form(config):
    """The same config as older versions wrote it."""
    rope = config.pop("rope_parameters", None)
    if "no_rope_layers" not in config and "sliding_attention" not in (rope or {}):
        config.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype")
    if rope is not None and "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    neox = config["model_type"] == "gpt_neox"
    if rope is not None:
        config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    return config


def assert_logits_equal(folder, model):
    checkpoint = open_checkpoint(str(folder))
    network = checkpoint.network()
    tensors = {name: checkpoint.read(name) for name in network.names()}
    ids = np.random.default_rng(0).integers(0, 50, (2, 19), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    found = logits_of(network, tensors, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model = save_model(tmp_path, *CASES[case])
    assert_logits_equal(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    network = make_network(config)
    assert make_network(older_form(config)) == network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_weights(dtype, tmp_path):
    model = save_model(tmp_path, "llama", SIZES, dtype)
    assert_logits_equal(tmp_path, model)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("phi3", "sparsegpt"),
        ("gemma2", "wanda"),
        ("gemma3", "sparsegpt"),
        ("smollm3", "magnitude"),
        ("olmo2", "wanda"),
        ("gpt_neox", "sparsegpt"),
        ("gpt2", "sparsegpt"),
        ("falcon-7b", "wanda"),
    ],
)
def test_pruned_families_load(case, method, tmp_path):
    model_type, settings = CASES[case]
    save_model(tmp_path / "source", model_type, settings | {"vocab_size": 256, "num_hidden_layers": 2})
    job = prepare(small_run(tmp_path, tmp_path / "source", method=method, allocation="uniform", sparsity=0.5))
    run(job)
    model = AutoModelForCausalLM.from_pretrained(job.path / "model", dtype=torch.float32).eval()
    assert_logits_equal(job.path / "model", model)
    masks, modules = read_masks(job.path), dict(model.named_modules())
    assert masks.keys() == job.network.layer_shapes().keys()
    for name, mask in masks.items():
        weight = modules[name].weight.detach().numpy()
        np.testing.assert_array_equal((weight.T if job.network.stored_in_out else weight) != 0, mask)
        assert mask.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("case", ["phi3", "gemma2", "gemma3", "olmo2", "gpt_neox", "gpt2", "falcon-7b", "falcon-40b"])
def test_inputs_of_linears(case, tmp_path):
    model, expected = save_model(tmp_path, *CASES[case]), {}
    checkpoint = open_checkpoint(str(tmp_path))
    network = checkpoint.network()
    modules = dict(model.named_modules())
    for linear in network.linears:
        keep = functools.partial(lambda linear, module, args: expected.update({linear: args[0].numpy()}), linear)
        modules[network.layer_name(0, linear)].register_forward_pre_hook(keep)
    ids = np.random.default_rng(0).integers(0, 50, (2, 19), dtype=np.int32)
    with torch.no_grad():
        model(torch.from_numpy(ids).long())
    tensors = {name: checkpoint.read(name) for part in ("embed", 0) for name in network.tensors(part)}
    x = apply_embed(network, state_of(network, "embed", tensors), ids)
    found = network.inputs(state_of(network, 0, tensors), x)
    assert found.keys() == expected.keys()
    for linear, array in found.items():
        np.testing.assert_allclose(array, expected[linear], atol=1e-4 * np.abs(expected[linear]).max())
