"""Files of Keras are read in all of its layouts, by the names of its layers, with what their axes count."""

import json
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest

import farms_jax
from farms_jax.errors import InputError
from farms_jax.weights import open_weights

RNG = np.random.default_rng(0)
LAYERS = {  # name: class, arrays by their names; in an order that is not the alphabet's
    "stem": ("Conv2D", {"kernel": (3, 3, 8, 32), "bias": (32,)}),
    "depthwise_conv2d": ("DepthwiseConv2D", {"depthwise_kernel": (3, 3, 32, 1)}),
    "conv2d_transpose_7": ("Conv2DTranspose", {"kernel": (3, 3, 24, 32), "bias": (24,)}),
    "batch_normalization": ("BatchNormalization", dict.fromkeys(("gamma", "beta", "moving_mean"), (24,))),
    "head": ("Dense", {"kernel": (24, 48), "bias": (48,)}),
    "attention": ("MultiHeadAttention", {"query": (48, 4, 12), "attention_output": (4, 12, 48)}),
}
CONFIG = {
    "class_name": "Functional",
    "config": {
        "name": "model",
        "layers": [{"class_name": kind, "config": {"name": name}} for name, (kind, _) in LAYERS.items()],
    },
}
ARRAYS = {
    f"{layer}/{leaf}" + "/kernel" * (layer == "attention"): RNG.normal(size=shape).astype(np.float32)
    for layer, (_, shapes) in LAYERS.items()
    for leaf, shape in shapes.items()
}
MEASURED = [name for name, array in ARRAYS.items() if array.ndim > 1 and "depthwise" not in name]
MEASURED_LAYERS = list(dict.fromkeys(name.partition("/")[0] for name in MEASURED))
SPELT = {
    "stem/kernel": "KKIO",
    "depthwise_conv2d/depthwise_kernel": None,
    "conv2d_transpose_7/kernel": "KKOI",
    "attention/query/kernel": "IOO",
    "attention/attention_output/kernel": "IIO",
}


def write_new(path):
    """Write the arrays as Keras 3 does, under numbers, with groups called by their layers' classes."""
    groups = {
        "stem": "conv2d",
        "conv2d_transpose_7": "conv2d_transpose",
        "head": "dense",
        "attention": "multi_head_attention",
    }
    with h5py.File(path, "w") as file:
        for layer, (_, shapes) in LAYERS.items():
            group = file.create_group(f"layers/{groups.get(layer, layer)}")
            group.create_group("vars").attrs["name"] = layer
            for number, leaf in enumerate(shapes):
                if layer == "attention":
                    inner = group.create_group(f"{leaf.removeprefix('attention_')}_dense/vars")
                    inner.attrs["name"] = leaf
                    inner["0"] = ARRAYS[f"{layer}/{leaf}/kernel"]
                else:
                    group[f"vars/{number}"] = ARRAYS[f"{layer}/{leaf}"]
        file["optimizer/vars/0"] = np.ones((24, 48), np.float32)
        file["optimizer/vars"].attrs["name"] = "adam"
    return path


def write_old(path):
    """Write the arrays as Keras 2 does, each below its layer's name twice."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(CONFIG)
        file.create_group("model_weights").attrs["layer_names"] = list(LAYERS)
        for name, array in ARRAYS.items():
            file[f"model_weights/{name.partition('/')[0]}/{name}:0"] = array
        file["optimizer_weights/adam/head_kernel_momentum:0"] = np.ones((24, 48), np.float32)
    return path


def write_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(CONFIG))
        archive.write(write_new(path.with_suffix(".h5")), "model.weights.h5")
    return path


@pytest.mark.parametrize(
    ("write", "filename", "in_order"),
    [(write_archive, "net.keras", True), (write_new, "net.weights.h5", False), (write_old, "net.h5", True)],
)
def test_layers_have_keras_names_axes_and_order(tmp_path, write, filename, in_order):
    with open_weights(write(tmp_path / filename)) as source:
        assert source.name == "net"
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(source.read(name), array)
        spelt = {pattern.replace("\\", ""): spelling for pattern, spelling in source.axes.axes.items()}
        assert spelt == SPELT
        assert {name for name, why in source.skipped.items() if why == "optimiser state"} == source.tensors.keys() - (
            ARRAYS.keys()
        )
    diagnosis = farms_jax.diagnose(tmp_path / filename, resamples=0, randomize=False, whole=False)
    assert sorted(diagnosis.names) == sorted(MEASURED)
    if in_order:
        assert list(dict.fromkeys(name.partition("/")[0] for name in diagnosis.names)) == MEASURED_LAYERS


def test_what_cannot_be_read_is_said(tmp_path):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        group = file.create_group("layers/dense/vars")
        group["0"] = RNG.normal(size=(24, 48)).astype(ml_dtypes.bfloat16).view("V2")
        group["0"].attrs["dtype"] = "bfloat16"
        group.create_dataset("1", (48, 24), "f4", external=[("elsewhere.bin", 0, 48 * 24 * 4)])
        group["2"] = h5py.ExternalLink("elsewhere.h5", "/secret")
    with open_weights(tmp_path / "net.weights.h5") as source:
        assert source.tensors["dense/kernel"].dtype == ml_dtypes.bfloat16
        assert source.unread == {"dense/bias": "its values are in another file"}
        assert len(source.tensors) == 2
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        file["velocity"] = np.ones((8, 64, 64), np.float32)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "flow.h5").read_bytes()[:3000])
    with pytest.raises(InputError, match=r"flow\.h5: an HDF5 file, but none of Keras; save its weights alone"):
        open_weights(tmp_path / "flow.h5")
    with pytest.raises(InputError, match=r"cut\.h5: damaged, not finished, or no file of Keras"):
        open_weights(tmp_path / "cut.h5")


def test_in_a_folder_other_formats_of_the_same_model_come_first(tmp_path):
    write_old(tmp_path / "tf_model.h5")
    assert open_weights(tmp_path).format == "keras"
    np.savez(tmp_path / "model.npz", up=np.ones((8, 8), np.float32))
    assert open_weights(tmp_path).format == "npz"
