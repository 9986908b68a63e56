"""Torch's checkpoints and GGUF: which tensors hold experts, and which of their axes are the outputs."""

import gguf
import numpy as np
import pytest
import safetensors.numpy
from weights_helpers import close_gguf

import farms_jax
from farms_jax import TORCH_AXES, axis_rules
from farms_jax._axes import LeafAxes
from farms_jax.weights import open_weights

RNG = np.random.default_rng(0)
EXPERTS, HIDDEN, INNER = 3, 32, 24
WIDE = farms_jax.Window(rows=8, aspect_ratio=2.0)  # windows of a matrix and of its transpose differ


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# The tensors of a block as transformers saves them, by architecture, with the axis of their outputs.
SAVED = {
    "gpt-oss, Llama 4": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", 2),
    "Qwen3, Mixtral": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", 1),
    "Granite": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight", 1),
    "Nemotron, without a gate": ("mixer.experts.up_proj", "mixer.experts.down_proj", 1),
}


@pytest.mark.parametrize("architecture", SAVED)
def test_experts_are_layers_with_their_outputs_as_rows(architecture):
    up, down, outputs = SAVED[architecture]
    factor = 1 if "without" in architecture else 2
    block = {up: noise(EXPERTS, factor * INNER, HIDDEN), down: noise(EXPERTS, HIDDEN, INNER)}
    params = {
        f"model.layers.{i}.{name}": leaf if outputs == 1 else leaf.swapaxes(1, 2)
        for i in (1, 10)
        for name, leaf in block.items()
    }
    biases = {f"{name}_bias": noise(EXPERTS, 5) for name in params}
    router = {"model.layers.1.mlp.router.weight": noise(8, HIDDEN)}
    report = farms_jax.analyze(params | biases | router, axes=axis_rules.torch, window=WIDE)
    alone = {
        f"model.layers.{i}.{name}[{j}]": leaf[j]
        for i in (1, 10)
        for name, leaf in block.items()
        for j in range(EXPERTS)
    }
    wanted = farms_jax.analyze(alone | router, axes=TORCH_AXES, window=WIDE)
    found = dict(zip(report.names, np.asarray(report.alpha).tolist(), strict=True))
    assert found == pytest.approx(dict(zip(wanted.names, np.asarray(wanted.alpha).tolist(), strict=True)), rel=1e-6)
    assert {name for name, _ in report.left_out} == set(biases)


def test_experts_one_by_one_and_shared_ones_are_plain_layers(tmp_path):
    shapes = {"experts.0.up_proj": (INNER, HIDDEN), "shared_experts.down_proj": (HIDDEN, INNER)}
    weights = {f"model.layers.1.mlp.{name}.weight": noise(*shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    diagnosis = farms_jax.diagnose(tmp_path / "model.safetensors", resamples=0, randomize=False)
    assert sorted(diagnosis.column("layer")) == sorted(weights)


def test_convolutions_in_time_and_video_and_what_is_no_matrix():
    params = {
        "encoder.conv1.weight": noise(20, 16, 3),
        "visual.patch_embed.proj.weight": noise(24, 3, 2, 4, 4),
        "layers.0.mixer.conv1d.weight": noise(64, 1, 4),
        "layers.0.mixer.A_log": noise(64, 16),
        "decoder.block.0.SelfAttention.relative_attention_bias.weight": noise(32, 8),
    }
    report = farms_jax.analyze(params, axes=axis_rules.torch)
    positions = dict(zip(report.names, report.num_positions, strict=True))
    assert positions == {"encoder.conv1.weight": 3, "visual.patch_embed.proj.weight": 32}
    assert {reason for _, reason in report.left_out} == {"declared as no matrix"}


def test_experts_in_gguf(tmp_path):
    tensors = {f"blk.0.ffn_{kind}_exps.weight": noise(EXPERTS, INNER, HIDDEN) for kind in ("gate", "up")}
    tensors |= {
        "blk.0.ffn_down_exps.weight": noise(EXPERTS, HIDDEN, INNER),
        "blk.0.ffn_gate_inp.weight": noise(8, HIDDEN),
    }
    others = {"blk.0.ffn_up_exps.bias": noise(EXPERTS, INNER), "blk.0.attn_sinks.weight": noise(4)}
    others |= {"blk.0.ssm_conv1d.weight": noise(64, 4), "blk.0.ssm_a": noise(64, 16)}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt-oss")
    for name, tensor in (tensors | others).items():
        writer.add_tensor(name, tensor)
    close_gguf(writer)
    diagnosis = farms_jax.diagnose(tmp_path / "model.gguf", window=WIDE, resamples=0, randomize=False)
    layers = {f"{name}[{j}]": t[j] for name, t in tensors.items() if t.ndim == 3 for j in range(EXPERTS)}
    layers["blk.0.ffn_gate_inp.weight"] = tensors["blk.0.ffn_gate_inp.weight"]
    alone = farms_jax.diagnose(layers, axes=TORCH_AXES, window=WIDE, resamples=0, randomize=False)
    for column in ("alpha", "whole_alpha", "ks_distance"):
        assert dict(zip(diagnosis.names, diagnosis.column(column), strict=True)) == dict(
            zip(alone.names, alone.column(column), strict=True)
        )
    assert {name for name, _ in diagnosis.left_out} == set(others)


def test_interleaved_heads_of_a_mixture_of_experts_in_gguf_are_put_in_order(tmp_path):
    """The file keeps its own names, for it has tensors of no Hugging Face name; the rows are those of Mixtral."""
    rows = noise(8, HIDDEN)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count(2)
    writer.add_tensor("blk.0.attn_q.weight", rows.reshape(2, 2, 2, HIDDEN).swapaxes(1, 2).reshape(8, HIDDEN).copy())
    writer.add_tensor("blk.0.ffn_up_exps.weight", noise(EXPERTS, INNER, HIDDEN))
    close_gguf(writer)
    with open_weights(tmp_path / "model.gguf") as source:
        np.testing.assert_array_equal(source.read("blk.0.attn_q.weight"), rows)


def test_experts_of_gpt_oss_in_four_bits_are_dequantised(tmp_path):
    """Values by the table of the format: sign, two bits of exponent with a bias of one, one bit of mantissa."""
    codes = RNG.integers(0, 16, (EXPERTS, HIDDEN, 64))
    exponents = RNG.integers(120, 130, (EXPERTS, HIDDEN, 2))
    exponent, mantissa = codes >> 1 & 3, codes & 1
    sizes = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    weights = np.where(codes & 8, -sizes, sizes) * np.repeat(2.0 ** (exponents - 127), 32, axis=-1)
    name = "model.layers.0.mlp.experts.down_proj"
    halves = codes.reshape(EXPERTS, HIDDEN, 2, 16, 2)
    stored = {
        f"{name}_blocks": (halves[..., 0] | halves[..., 1] << 4).astype(np.uint8),
        f"{name}_scales": exponents.astype(np.uint8),
        f"{name}_bias": noise(EXPERTS, HIDDEN),
    }
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    with open_weights(tmp_path / "model.safetensors") as source:
        assert [weight for weight in source.tensors if weight not in source.skipped] == [name, f"{name}_bias"]
        assert set(source.skipped.values()) == {f"part of the quantised weight {name}"}
        np.testing.assert_array_equal(source.read(name), weights.astype(np.float32))
        part = source.read_layer(name, LeafAxes((1,), (2,), (0,)), (2,))
        np.testing.assert_array_equal(part, weights[2].astype(np.float32))
    diagnosis = farms_jax.diagnose(tmp_path / "model.safetensors", resamples=0, randomize=False)
    assert diagnosis.column("layer") == [f"{name}[{i}]" for i in range(EXPERTS)]


def test_bytes_that_are_no_pair_stay_as_they_are(tmp_path):
    stored = {"a_blocks": np.ones((4, 2, 16), np.uint8), "a_scales": np.ones((4, 3), np.uint8), "b_blocks": noise(4, 8)}
    stored |= {"c_blocks": np.ones(16, np.uint8), "c_scales": np.ones((), np.uint8)}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    with open_weights(tmp_path / "model.safetensors") as source:
        assert set(source.tensors) == set(stored)
