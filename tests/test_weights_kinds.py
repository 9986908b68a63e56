"""What in a checkpoint is a weight, and what the axes of its kernels count."""

from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from weights_helpers import close_gguf

import farms_jax
from farms_jax._axes import as_matrices
from farms_jax.errors import AxesWarning, InputError
from farms_jax.weights import TensorInfo, open_weights
from farms_jax.weights.beside import DATA, GRADIENT, IMPORTANCE, STATISTICS
from farms_jax.weights.skipped import AVERAGE, COPY, MASK, OPTIMISER, TABLE, UNMERGED, not_weights

RNG = np.random.default_rng(0)
QUICK = {"resamples": 0, "randomize": False, "whole": False}
BIG = (64, 48)


BESIDE = {
    # Stable Diffusion's average has names without separators.
    AVERAGE: [
        {"model.net.0.weight": BIG, "model_ema.net0weight": BIG, "model_ema.decay": ()},
        {"model.net.weight": BIG, "ema.module.net.weight": BIG, "ema.updates": ()},
        {"model.net.weight": BIG, "ema.shadow_params.0": BIG},
        {"quantize.embed": BIG, "quantize.embed_avg": BIG},
        {"params/up/kernel": BIG, "ema_params/up/kernel": BIG},
    ],
    COPY: [
        {"encoder_q.conv.weight": BIG, "encoder_k.conv.weight": BIG},
        {"student.module.net.weight": BIG, "teacher.net.weight": BIG},
    ],
    OPTIMISER: [
        {"bert/dense/kernel": BIG, "bert/dense/kernel/Adam": BIG, "bert/dense/kernel/adam_m": BIG},
        {"net.weight": BIG, "optimizer_state_dict.state.0.exp_avg": BIG},
    ],
    MASK: [
        {"h.0.attn.c_attn.weight": BIG, "h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()},
        {"sa.key.weight": BIG, "sa.tril": (64, 64)},
        {"layers.0.qkv.weight": BIG, "layers.0.attn_mask": (16, 49, 49)},
    ],
    TABLE: [
        {"q.weight": BIG, "rotary_emb.cos_cached": (1, 1, 64, 32), "rotary_emb.inv_freq": (16,), "freqs_cis": (64, 32)},
        {"conv.weight": BIG, "mel_filters": (80, 201)},
    ],
    DATA: [
        {"net.weight": BIG, "x_train": (500, 48), "data": BIG, "hidden_states.0": BIG, "loss": (9, 9)},
        {"test_images": (500, 48), "X_val": (9, 48)},
    ],
    GRADIENT: [{"net.weight": BIG, "net.weight_grad": BIG, "grad_net": BIG, "grads.net.weight": BIG}],
    IMPORTANCE: [{"net.weight": BIG, "net__weight_EWC_fisher": BIG, "importance.net.weight": BIG, "weight_omega": BIG}],
    STATISTICS: [{"net.weight": BIG, "obs_mean": (1, 48), "std": (1, 48), "net.act_stats": BIG, "input_cov": (48, 48)}],
    UNMERGED: [{"q.base_layer.weight": BIG, "q.lora_A.default.weight": (4, 48), "q.lora_B.default.weight": (64, 4)}],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "shapes"), [(reason, case) for reason, cases in BESIDE.items() for case in cases])
def test_what_is_no_weight_has_its_reason(reason, shapes):
    weights = {"model.net.0.weight", "model.net.weight", "quantize.embed", "params/up/kernel"}
    weights |= {
        "encoder_q.conv.weight",
        "student.module.net.weight",
        "bert/dense/kernel",
        "net.weight",
        "sa.key.weight",
    }
    weights |= {"q.base_layer.weight", "h.0.attn.c_attn.weight", "layers.0.qkv.weight", "q.weight", "conv.weight"}
    found = not_weights({name: TensorInfo(np.dtype(np.float32), shape) for name, shape in shapes.items()})
    assert found == dict.fromkeys(shapes.keys() - weights, reason)


def test_modules_with_such_names_are_weights():
    shapes = (
        "mask_head.weight",
        "mask_decoder.up.weight",
        "cos.weight",
        "teacher.down.weight",
        "anchor.weight",
        "action_mean.weight",
        "data.weight",
        "gradient.weight",
        "gate.importance",
        "fb.w",
    )
    assert not_weights(dict.fromkeys(shapes, TensorInfo(np.dtype(np.float32), BIG))) == {}


def test_biases_of_every_rank_are_no_layers():
    """Of stacked experts (gpt-oss, GGUF), heads (TransformerLens) and TensorFlow, whose names end in `:0`."""
    biases = ("experts.gate_up_proj_bias", "blk.0.ffn_up_exps.bias", "attn.b_Q", "attn.b_O", "mlp.b_in", "dense/bias:0")
    tree = {name: np.ones(BIG) for name in biases}
    tree["bert/position_embeddings/embeddings:0"] = RNG.normal(size=(512, 64))
    diagnosis = farms_jax.diagnose({**tree, "up.weight": RNG.normal(size=BIG)}, **QUICK)
    assert diagnosis.names == ("up.weight",)


def test_an_average_is_measured_where_it_is_asked_for(tmp_path):
    weight = RNG.normal(size=BIG).astype(np.float32)
    safetensors.numpy.save_file({"up.weight": weight, "ema.up.weight": weight / 2}, path := tmp_path / "m.safetensors")
    diagnosis = farms_jax.diagnose(path, **QUICK)
    assert diagnosis.names == ("up.weight",)
    assert dict(diagnosis.left_out) == {"ema.up.weight": AVERAGE}
    assert farms_jax.diagnose(path, include=r"ema\..*", **QUICK).names == ("ema.up.weight",)
    assert farms_jax.diagnose(path, include=r".*up.*", **QUICK).names == ("up.weight",)


def test_the_first_line_says_what_share_was_measured(tmp_path):
    tree = {"up": RNG.normal(size=(64, 48)), "unknown": RNG.normal(size=(2, 64, 48)), "ids": np.ones((64, 64), int)}
    with pytest.warns(AxesWarning, match="67% of the weights are left out"):
        diagnosis = farms_jax.diagnose(tree, **QUICK)
    assert ": 1 layer with 33 % of 9,216 parameters, " in diagnosis.headline()
    assert (diagnosis.facts["num_params"], diagnosis.facts["quantisation"]) == (9216, "")


KERNEL = RNG.normal(size=(3, 3, 24, 40)).astype(np.float32)  # h, w, inputs, outputs
LAYOUTS = {"torch": (3, 2, 0, 1), "flax": (0, 1, 2, 3), "mlx": (3, 0, 1, 2)}
SAID = [
    ("flax", "conv.weight", {"format": "flax"}, ""),
    ("flax", "conv/kernel", {}, ""),
    ("flax", "conv/kernel:0", {"format": "tf"}, ""),
    ("flax", "layers/conv2d/vars/0", {}, "(h, w, inputs, outputs)"),
    ("flax", "conv.w", {"format": "pt"}, "(h, w, inputs, outputs)"),
    ("mlx", "conv.weight", {"format": "mlx"}, ""),
    ("mlx", "conv.weight", {}, "(outputs, h, w, inputs)"),
    ("torch", "conv.weight", {"format": "pt"}, ""),
    ("torch", "conv.weight", {}, ""),
]


@pytest.mark.parametrize(("layout", "name", "metadata", "doubt"), SAID)
def test_kernels_are_read_as_who_wrote_them_stores_them(tmp_path, layout, name, metadata, doubt):
    stored = np.ascontiguousarray(KERNEL.transpose(LAYOUTS[layout]))
    safetensors.numpy.save_file({name: stored}, path := tmp_path / "model.safetensors", metadata or None)
    with open_weights(path) as source:
        assert doubt in source.doubt and bool(doubt) == bool(source.doubt)
        axes = source.axes.default if isinstance(source.axes, farms_jax.AxisRules) else source.axes
        assert axes is not None
        found = as_matrices(source.read(name), axes.of(4))[0]
    np.testing.assert_array_equal(found, KERNEL.reshape(9, 24, 40).swapaxes(1, 2))
    with open_weights(path, axes=farms_jax.FLAX_AXES) as source:
        assert source.doubt == ""


def test_a_layout_that_shapes_alone_tell_is_said(tmp_path):
    stored: dict[str, Any] = {"conv.weight": KERNEL.transpose(LAYOUTS["torch"])}
    np.savez(tmp_path / "model.npz", **stored)
    with pytest.warns(
        AxesWarning, match=r"conv.weight \(40, 24, 3, 3\) is read as \(outputs, inputs, h, w\), as Torch"
    ):
        (found,) = farms_jax.diagnose(tmp_path / "model.npz", **QUICK).column("alpha")
    assert found == farms_jax.diagnose({"conv": {"kernel": KERNEL}}, **QUICK).column("alpha")[0]


def test_a_tensor_of_gguf_that_cannot_be_read_is_left_out(tmp_path):
    writer = gguf.GGUFWriter(path := tmp_path / "model.gguf", "any")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    weight = RNG.normal(size=BIG)
    writer.add_tensor("up.weight", weight)  # float64
    writer.add_tensor("ids", np.arange(64, dtype=np.int32))
    kind = gguf.GGMLQuantizationType.Q8_K
    writer.add_tensor("down.weight", np.zeros((4, 292), np.uint8), raw_dtype=kind)
    close_gguf(writer)
    with open_weights(path) as source:
        np.testing.assert_array_equal(source.read("up.weight"), weight)
        np.testing.assert_array_equal(source.read("ids"), np.arange(64))
        assert source.quantisation == "Q8_0 (F64 1, I32 1, Q8_K 1)"
    diagnosis = farms_jax.diagnose(path, **QUICK)
    assert diagnosis.headline().startswith("model, Q8_0 (F64 1, I32 1, Q8_K 1): 1 layer with 75 % of 4,096 parameters")
    assert "Q8_K cannot be undone here" in dict(diagnosis.left_out)["down.weight"]


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        ({"m.onnx": b"\x08\x0a"}, "m.onnx", "an ONNX model.*onnx.numpy_helper"),
        ({"saved_model.pb": b"\x08\x01"}, "", "a SavedModel of TensorFlow, that is a program.*as .keras"),
        ({"m-1.index": b"\0", "m-1.data-00000-of-00001": b"\1"}, "", "a checkpoint of TensorFlow.*load_variable"),
        ({"m-1.index": b"\0", "m-1.data-00000-of-00001": b"\1"}, "m-1.data-00000-of-00001", "a checkpoint of Tensor"),
        ({"model": b"\x1c\0\0\0TFL3"}, "model", "a TensorFlow Lite model"),
        ({"m.mlmodel": b"\x08\x04"}, "m.mlmodel", "a Core ML model"),
        ({"ggml.bin": b"lmgg0000"}, "ggml.bin", "a file of GGML before GGUF"),
        ({"m.xml": b"<net/>", "m.bin": b"\1" * 9}, "m.bin", "a model of OpenVINO"),
    ],
)
def test_files_of_other_tools_are_named_with_the_remedy(tmp_path, files, given, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_weights(tmp_path / given)


@pytest.mark.parametrize("order", "CF")
def test_a_single_array_of_numpy_is_read(tmp_path, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(6, 4)), order=order)
    np.save(tmp_path / "up.npy", array)
    with open_weights(tmp_path / "up.npy") as source:
        assert source.tensors == {"up": (array.dtype, (6, 4))}
        np.testing.assert_array_equal(source.read("up"), array)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "up.npy").read_bytes()[:-8])
    for name, said in (("objects", "pickles, which are never loaded"), ("cut", "damaged, or not finished")):
        with pytest.raises(InputError, match=said):
            open_weights(tmp_path / f"{name}.npy")
