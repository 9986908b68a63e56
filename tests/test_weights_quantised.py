"""Quantised weights are measured as the numbers that they stand for; what belongs to them is no layer."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import farms_jax
from farms_jax._axes import LeafAxes
from farms_jax.weights import TensorInfo, open_weights
from farms_jax.weights.safetensors_file import make_layout, read_layout, read_tensor

RNG = np.random.default_rng(0)
GOLDEN = Path(__file__).parent / "data" / "quantised.safetensors"
LAYOUT = read_layout(GOLDEN)
QUICK = {"resamples": 0, "randomize": False, "whole": False}


def folder(path, tensors, config=None, **metadata):
    """Write a model: safetensors with a config beside it."""
    layout = make_layout({name: TensorInfo(a.dtype, a.shape) for name, a in tensors.items()}, metadata)
    content = b"".join(np.ascontiguousarray(tensors[name]).tobytes() for name in layout.tensors)
    (path / "model.safetensors").write_bytes(layout.header + content)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def why(source):
    """Return what is said of all that is left out."""
    return {**source.skipped, **source.unread}


@pytest.mark.parametrize("case", sorted(LAYOUT.metadata))
def test_weights_are_those_of_the_library(tmp_path, case):
    """The numbers that bitsandbytes, MLX, auto-round, AutoAWQ and compressed-tensors themselves return."""
    stored = {
        name.partition("|")[2]: read_tensor(GOLDEN, name, entry)
        for name, entry in LAYOUT.tensors.items()
        if name.startswith(f"{case}|")
    }
    want = stored.pop("want")
    with open_weights(folder(tmp_path, stored, json.loads(LAYOUT.metadata[case]))) as source:
        assert source.read("up.weight").dtype == np.float32
        # Some libraries compute in half precision.
        np.testing.assert_allclose(source.read("up.weight"), want, atol=1e-3 * np.abs(want).max())
        floats = {name for name, info in source.tensors.items() if info.dtype.kind not in "iu"}
        assert floats - why(source).keys() == {"up.weight"}  # HQQ stores its settings as integers
        assert set(why(source).values()) == {"part of the quantised weight up.weight"}
        assert source.quantisation.endswith("(1 weight)")


def test_blocks_of_deepseek_need_not_divide_a_weight(tmp_path):
    """W = weight * scale_inv over blocks of 128 x 128, the last of which are smaller."""
    numbers = RNG.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scales = RNG.uniform(1e-4, 1e-2, (2, 3)).astype(np.float32)
    want = numbers.astype(np.float64) * np.kron(scales.astype(np.float64), np.ones((128, 128)))[:200, :300]
    experts = RNG.normal(size=(3, 64, 48)).astype(ml_dtypes.float8_e4m3fn)
    powers = RNG.uniform(1, 2, (3, 64, 1)).astype(np.float32)
    stored = {
        "up.weight": numbers,
        "up.weight_scale_inv": scales,
        "up.input_scale": np.ones((), np.float32),
        "experts.down_proj": experts,
        "experts.down_proj_scale": powers,
        "experts.down_proj_bias": np.ones((3, 64), np.float32),
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with open_weights(folder(tmp_path, stored, config)) as source:
        np.testing.assert_allclose(source.read("up.weight"), want, rtol=1e-6)
        part = source.read_layer("experts.down_proj", LeafAxes((1,), (2,), (0,)), (2,))
        np.testing.assert_allclose(part, experts[2].astype(np.float64) * powers[2], rtol=1e-6)
        assert "experts.down_proj_bias" not in why(source)
        assert source.quantisation == "FP8 (2 weights)"
    diagnosis = farms_jax.diagnose(tmp_path, **QUICK)
    assert diagnosis.names == ("experts.down_proj[0]", "experts.down_proj[1]", "experts.down_proj[2]", "up.weight")
    assert diagnosis.headline().startswith(f"{tmp_path.name}, FP8 (2 weights): 4 layers with 99.7 % of 69,408 ")


def test_inputs_of_gptq_are_in_the_groups_that_it_says(tmp_path):
    """Act-order: W[o, i] = scales[g_idx[i], o] * (q[i, o] - zeros[g_idx[i], o] - 1), in float64."""
    numbers, zeros = RNG.integers(0, 16, (64, 32)), RNG.integers(0, 15, (4, 32))
    scales, groups = RNG.uniform(1e-3, 1e-2, (4, 32)).astype(np.float16), RNG.permutation(np.arange(64) % 4)

    def packed(values):  # eight in a row to an integer
        return (values.reshape(-1, 8).astype(np.uint64) << np.arange(0, 32, 4, dtype=np.uint64)).sum(1)

    stored = {
        "up.qweight": packed(numbers.T).reshape(32, 8).T.astype(np.uint32).view(np.int32),
        "up.qzeros": packed(zeros).reshape(4, 4).astype(np.uint32).view(np.int32),
        "up.scales": scales,
        "up.g_idx": groups.astype(np.int32),
    }
    want = (scales.astype(np.float64)[groups] * (numbers - zeros[groups] - 1)).T
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}}
    with open_weights(folder(tmp_path, stored, config)) as source:
        np.testing.assert_allclose(source.read("up.weight"), want, rtol=1e-6)
    (tmp_path / "config.json").unlink()
    with open_weights(tmp_path) as source:
        assert source.unread == {
            "up.qweight": "quantised, but no config.json beside it says with how many bits and in what groups"
        }
        assert "up.scales" in source.skipped


def by_formula(case):
    """Return arrays of a weight in a method's layout, its settings, and by its formula the weight in float64."""
    if case == "bitnet":  # number i of a byte is of row i * rows + row; W = numbers / scale
        numbers, scale = RNG.integers(-1, 2, (64, 48)), np.array([3.0], np.float32)
        packed = sum((numbers[16 * i : 16 * (i + 1)] + 1) << 2 * i for i in range(4))
        return {"weight": packed.astype(np.uint8), "weight_scale": scale}, {"quant_method": "bitnet"}, numbers / 3.0
    if case == "gemma":  # the lowest bits first, along the inputs; a scale for each row
        numbers, scales = RNG.integers(-2, 2, (32, 48)), RNG.uniform(1, 2, (32, 1)).astype(np.float32)
        packed = sum((numbers[:, i::4] + 2) << 2 * i for i in range(4)).astype(np.uint8)
        config = {"quant_method": "gemma", "num_bits": 4, "module_quant_configs": {"^up$": {"num_bits": 2}}}
        return {"weight": packed, "weight_scale": scales}, config, numbers * scales.astype(np.float64)
    if case == "torchao":  # (numbers - zeros) * scales in groups of 16
        numbers, zeros = RNG.integers(-128, 128, (32, 48)), RNG.integers(-9, 9, (32, 3))
        scales = RNG.uniform(1, 2, (32, 3)).astype(np.float32)
        stored = {"_weight_qdata": numbers.astype(np.int8), "_weight_zero_point": zeros.astype(np.int8)}
        want = (numbers - np.repeat(zeros, 16, 1)) * np.repeat(scales.astype(np.float64), 16, 1)
        return stored | {"_weight_scale": scales}, {"quant_method": "torchao"}, want
    codes, scales = RNG.integers(0, 256, (16, 6, 2)), RNG.uniform(1, 2, (16, 1, 1, 1)).astype(np.float16)
    books = RNG.normal(size=(2, 256, 2, 8)).astype(np.float16)
    blocks = sum(books[i].astype(np.float64)[codes[..., i]] for i in range(2)) * scales
    want = np.block([[blocks[i, j] for j in range(6)] for i in range(16)])
    return {"codes": codes.astype(np.uint8).view(np.int8), "codebooks": books, "scales": scales}, None, want


@pytest.mark.parametrize("case", ["bitnet", "gemma", "torchao", "aqlm"])
def test_weights_are_those_of_the_formula(tmp_path, case):
    stored, config, want = by_formula(case)
    config = config and {"quantization_config": config}
    with open_weights(folder(tmp_path, {f"up.{leaf}": array for leaf, array in stored.items()}, config)) as source:
        np.testing.assert_allclose(source.read("up.weight"), want, rtol=2e-6, atol=1e-6)
        assert {name for name in source.tensors if name not in why(source)} == {"up.weight"}


UNREAD = {
    "vptq of floats": (
        {
            "up.indices": np.ones((1, 8, 64), np.float16),
            "up.centroids.weight": np.ones((1, 512), np.float16),
            "up.weight_scale": np.ones(64, np.float16),
        },
        None,
        {"up.indices": "quantised by VPTQ"},
    ),
    "torchao of four bits": (
        {
            "up._weight_qdata": np.ones((64, 128), np.int8),
            "up._weight_scale": np.ones((8, 64), np.float16),
            "up._weight_zero_point": np.ones((8, 64), np.float16),
        },
        None,
        {"up._weight_qdata": "this is int8, packed"},
    ),
    "awq of a kernel": (
        {
            "up.qweight": np.ones((16, 32), np.int32),
            "up.qzeros": np.ones((4, 24), np.int32),
            "up.scales": np.ones((4, 64), np.float16),
        },
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"up.qweight": "in an order that is not known here"},
    ),
    "marlin": (
        {"up.B": np.ones((4, 128), np.int32), "up.s": np.ones((4, 64), np.float16)},
        None,
        {"up.B": "quantised by Marlin"},
    ),
    "mlx without a config": (
        {"up.weight": np.ones((64, 8), np.uint32), "up.scales": np.ones((64, 2)), "up.biases": np.ones((64, 2))},
        None,
        {"up.weight": "no config.json beside it"},
    ),
    "sinq": (
        {"up.W_q": np.ones((64, 8), np.uint8), "up.scale": np.ones((64, 2)), "up.zero": np.ones((64, 2))},
        {"quantization_config": {"quant_method": "sinq"}},
        {"up.W_q": "quantised by sinq, whose rule is not known here"},
    ),
    "gptq of no shape": (
        {"up.qweight": np.ones((8, 8, 8), np.int32), "up.qzeros": np.ones(8, np.int32), "up.scales": np.ones(())},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"up.qweight": "its parts or its settings are none that belong together"},
    ),
    "exl2, unsaid": (
        {
            "up.q_weight": np.ones((64, 8), np.int32),
            "up.q_scale_max": np.ones((4, 4), np.float16),
            "up.bias": np.ones(8),
        },
        None,
        {"up.q_weight": "quantised by EXL2"},
    ),
    "float8 as it is": (
        {"up.weight": np.ones((64, 8), ml_dtypes.float8_e4m3fn), "other.weight": np.ones((8, 8), np.float32)},
        None,
        {"up.weight": "float8_e4m3fn without its scales"},
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_cannot_be_dequantised_is_left_out_with_its_reason(tmp_path, case):
    tensors, config, unread = UNREAD[case]
    with open_weights(folder(tmp_path, tensors, config)) as source:
        assert source.unread.keys() == unread.keys()
        assert all(reason in source.unread[name] for name, reason in unread.items())
        parts = {name for name in tensors if name.startswith("up.") and name not in unread} - {"up.bias"}
        assert source.skipped.keys() == parts


def test_packed_floats_and_complex_numbers_refuse_no_file(tmp_path):
    wave = (RNG.normal(size=(64, 48)) + 1j * RNG.normal(size=(64, 48))).astype(np.complex64)
    folder(tmp_path, {"wave": wave, "eight": RNG.normal(size=(48, 64)).astype(ml_dtypes.float8_e5m2)})
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    end = header["eight"]["data_offsets"][1]
    header["four"] = {"dtype": "F4", "shape": [32, 64], "data_offsets": [end, end + 1024]}
    header["six"] = {"dtype": "F6_E2M3", "shape": [32, 64], "data_offsets": [end + 1024, end + 2560]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + content[8 + size :] + bytes(2560)
    )
    diagnosis = farms_jax.diagnose(tmp_path, **QUICK)
    assert diagnosis.names == ("wave",)
    assert dict(diagnosis.left_out) == {
        "eight": "float8_e5m2 without its scales",
        "four": "float4_e2m1fn without its scales",
        "six": "float6_e2m3fn without its scales",
    }
    # Asked for by name, eight-bit floats are measured as they are.
    assert farms_jax.diagnose(tmp_path, include="eight", **QUICK).names == ("eight",)
    assert diagnosis.column("alpha") == farms_jax.diagnose({"wave": wave}, axes=farms_jax.TORCH_AXES, **QUICK).column(
        "alpha"
    )
