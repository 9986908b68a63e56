"""Weights of Torch: every file of `torch.save` that is met, and modules and state dicts in memory."""

import argparse
import collections
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from farms_jax._layers import select_layers
from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.diagnosis.pipeline import diagnose, opened
from farms_jax.errors import InputError
from farms_jax.weights import LoraSource, open_weights
from farms_jax.weights.beside import DATA, STATISTICS
from farms_jax.weights.skipped import BESIDE
from farms_jax.weights.torch_file import conversion_command


class Settings(dict):
    """A dictionary of a class that Torch does not know, as trainings have for their settings."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(12, 16))


def optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def around(model):
    """What trainings save: the model under every usual name, and what they put beside it."""
    state, optimizer = model.state_dict(), optimizer_state(model)
    average = {name: tensor.clone() for name, tensor in state.items()}
    arguments = argparse.Namespace(lr=0.1, device=torch.device("cuda"))
    odd = {"settings": Settings(depth=2), "seen": collections.defaultdict(list, {"a": [1]}), "best": np.float64(0.5)}
    return {
        "plain.pth": state,
        "model.pt": {"model": state, "epoch": 3, "rng": torch.get_rng_state(), "centers": {"k": torch.ones(9, 8)}},
        "tutorial.pt": {"model_state_dict": state, "optimizer_state_dict": optimizer, "loss": 0.3},
        "imagenet.pth.tar": {"state_dict": state, "optimizer": optimizer, "best_acc1": torch.tensor(0.5)},
        "deepspeed.pt": {"module": state, "optimizer": None},
        "net.pth": {"net": state, "acc": 93.0, "codes": [torch.ones(9, 8)], "preds": torch.ones(9, 8)},
        "torchvision.pth": {"model": state, "model_ema": average, "optimizer": optimizer, "args": arguments},
        "timm.pth.tar": {"state_dict": state, "state_dict_ema": average, "arch": "resnet", **odd},
        "epoch=1-step=100.ckpt": {
            "state_dict": state,
            "callbacks": {
                "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)},
                "StochasticWeightAveraging": {"average_model_state": average},
            },
            "optimizer_states": [optimizer],
            "hyper_parameters": {"lr": 0.1},
        },
        "whole.pt": model,
        "yolo.pt": {"model": model, "ema": None, "epoch": -1},
        "fastai.pth": {"model": state, "opt": {"state": [{"grad_avg": torch.ones(16, 12)}], "hypers": []}},
        "dino.pth": {"student": {f"module.{name}": tensor for name, tensor in state.items()}, "teacher": average},
        "blob": state,
    }


def expected(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def kept(source):
    """The arrays that are weights; scalars beside a model are none."""
    return {
        name: source.read(name)
        for name, info in source.tensors.items()
        if name not in source.skipped and info.shape and info.dtype.kind == "f"
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_model_is_found_under_every_name(tmp_path, zipped):
    model = network()
    names = set(expected(model)) - {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for filename, content in around(model).items():
        if not zipped and filename in {"whole.pt", "yolo.pt"}:
            continue
        torch.save(content, tmp_path / filename, _use_new_zipfile_serialization=zipped)
        with open_weights(tmp_path / filename) as source:
            found = {name.removeprefix("module."): array for name, array in kept(source).items()}
            assert set(found) == names, filename
            for name in names:
                np.testing.assert_array_equal(found[name], expected(model)[name])
            reasons = set(source.skipped.values())
        copies = {"moving average of the weights", "copy of the model's weights, such as their average"}
        assert reasons <= {"optimiser state", STATISTICS, BESIDE, DATA, *copies}, filename


def test_other_parts_of_a_model_are_beside_the_first(tmp_path):
    torch.save({"net": {"up.weight": torch.ones(4, 3)}, "head": {"weight": torch.ones(2, 4)}}, tmp_path / "parts.pt")
    with open_weights(tmp_path / "parts.pt") as source:
        assert (set(source.tensors), source.skipped) == ({"up.weight", "head.weight"}, {})


def tensors():
    torch.manual_seed(0)
    tied = torch.randn(6, 4)
    return {
        "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3).t(),
        "part": torch.randn(9, 9)[2:5, 1:7],
        "bfloat16": torch.randn(4, 3).bfloat16(),
        "float16": torch.randn(4, 3).half(),
        "float8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "conjugate": torch.randn(4, 3, dtype=torch.complex64).conj(),
        "parameter": nn.Parameter(torch.randn(4, 3)),
        "quantised": torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        "nested": {"list": [torch.randn(4, 3), {"deep": torch.randn(2, 2)}], "none": None, "text": "t"},
        "embed": tied,
        "head": tied,
        7: torch.tensor(2.0).bfloat16(),
    }


def test_tensors_of_every_kind(tmp_path):
    content = tensors()
    torch.save(content, tmp_path / "kinds.pt")
    with open_weights(tmp_path / "kinds.pt") as source:
        assert source.skipped == {"head": "the same as embed"}
        for name, tensor in content.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            dense = (tensor.dequantize() if tensor.is_quantized else tensor.detach()).to_dense()
            value = dense.to(torch.complex64).numpy(force=True)
            array = source.read(str(name))
            assert tuple(source.tensors[str(name)]) == (array.dtype, array.shape)
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array.astype(np.complex64), value)
        assert source.tensors["bfloat16"].dtype == ml_dtypes.bfloat16
        assert source.tensors["float8"].dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(source.read("nested.list.1.deep"), content["nested"]["list"][1]["deep"].numpy())


def test_quantised_weights_are_what_they_stand_for(tmp_path):
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)
    torch.save({"model": {"up.weight": weight, "up.weight_scale_inv": torch.full((1, 1), 2.0)}}, tmp_path / "fp8.pt")
    with open_weights(tmp_path / "fp8.pt") as source:
        assert source.skipped == {"up.weight_scale_inv": "part of the quantised weight up.weight"}
        np.testing.assert_array_equal(source.read("up.weight"), 2 * weight.float().numpy())


def test_the_conversion_command_writes_all_tensors(tmp_path):
    content = tensors() | {"args": argparse.Namespace(a=1), "net": network(), "best": np.float64(0.5)}
    content |= {"settings": Settings(depth=2), "seen": collections.defaultdict(list, {"a": [1]})}
    del content["conjugate"], content["float8"]  # which not every version of safetensors has
    (folder := tmp_path / "my models").mkdir()
    torch.save(content, folder / "v1.5.pth.tar")
    command = conversion_command([folder / "v1.5.pth.tar"]).replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    with open_weights(folder / "v1.5.safetensors") as converted, open_weights(folder / "v1.5.pth.tar") as source:
        names = {name.removeprefix("net.") for name in converted.tensors}
        assert names == set(source.tensors)
        for name in {"channels_last", "bfloat16", "quantised", "sparse", "head", "7"}:
            np.testing.assert_array_equal(converted.read(name), source.read(name))


def test_shards_and_a_trainer_folder(tmp_path):
    state = network().state_dict()
    names = list(state)
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    weight_map = {}
    for number, filename in enumerate(files):
        part = {name: state[name] for name in names[number::2]}
        torch.save(part, tmp_path / filename)
        weight_map |= dict.fromkeys(part, filename)
    for filename in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        torch.save({"w": torch.randn(3, 3)}, tmp_path / filename)
    for index in (None, {"metadata": {}, "weight_map": weight_map}):
        if index:
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with open_weights(tmp_path) as source:
            assert set(source.tensors) == set(names)
            assert source.name == tmp_path.name
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).path == tmp_path / "pytorch_model.bin"
    for filename in (*files[:1], "pytorch_model.bin"):
        (tmp_path / filename).unlink()
    with pytest.raises(InputError, match=r"-00001-of-00002.bin: this shard is missing, .*index.json names"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(InputError, match=r"pytorch_model-00001-of-00002.bin: this shard is missing"):
        open_weights(tmp_path)


class Bomb:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_no_code_runs(tmp_path):
    torch.save({"model": network().state_dict(), "bomb": Bomb()}, tmp_path / "bomb.pt")
    with open_weights(tmp_path / "bomb.pt") as source:
        assert "bomb" not in source.tensors
    model = network().eval()
    torch.jit.save(torch.jit.script(model[2]), tmp_path / "script.pt")
    torch.export.save(torch.export.export(model[2], (torch.ones(1, 12),)), tmp_path / "program.pt2")
    torch.save(model, tmp_path / "module.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), tmp_path / "protocol4.pth", pickle_protocol=4)
    for filename, message in {
        "script.pt": r"TorchScript archive, that is a program, .*torch.jit.load\(FILE\).state_dict",
        "program.pt2": r"torch.export, that is a program, .*torch.export.load\(FILE\).state_dict",
        "module.pth": r"without running code in it .*model.state_dict",
        "protocol4.pth": r"without running code in it \(Unsupported operand 149\)",
    }.items():
        with pytest.raises(InputError, match=rf"{filename}: .*{message}"):
            open_weights(tmp_path / filename)


def test_a_file_that_changes_or_ends_too_early(tmp_path):
    path = tmp_path / "last.pt"
    torch.save(network().state_dict(), path)
    with open_weights(path) as source:
        torch.save({}, path)
        with pytest.raises(InputError, match=r"last.pt: has changed since it was opened"):
            source.read("2.weight")
    for zipped in (True, False):
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(InputError, match=r"last.pt: (ends too early|damaged, not finished)"):
            open_weights(path)


@pytest.mark.parametrize("has_checksums", [True, False])
def test_an_entry_whose_checksum_is_another_is_damaged(tmp_path, monkeypatch, has_checksums):
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: has_checksums)
    path, state = tmp_path / "weights.pt", {"up.weight": torch.rand(64, 48), "down.weight": torch.rand(48, 64)}
    torch.save(state, path)
    content = path.read_bytes()
    at = content.index(state["up.weight"].numpy().tobytes()) + 400
    path.write_bytes(content[:at] + bytes(800) + content[at + 800 :])
    with open_weights(path) as source:
        np.testing.assert_array_equal(source.read("down.weight"), state["down.weight"])
        if not has_checksums:
            assert (source.read("up.weight") == 0).sum() >= 200
            return
        with pytest.raises(InputError, match="up.weight is damaged: its checksum is another; download"):
            source.read("up.weight")


def axes_of(model):
    """Name -> (positions, outputs, inputs) of the layers of a model."""
    source = opened(model)
    weights = [(name, info) for name, info in source.tensors.items() if name not in source.skipped]
    found = select_layers(weights, Window(), Tail(), source.axes, params=dict(weights))
    return {leaf.name: leaf.shape[1:] for leaf in found.leaves}


def test_modules_know_their_axes(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({
        "up": nn.ConvTranspose2d(8, 6, 3),
        "up1": nn.ConvTranspose1d(8, 6, 5),
        "one": nn.Conv1d(8, 6, 5),
        "wide": nn.Conv2d(8, 6, (1, 40)),
        "normed": nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 3)),
        "gpt": Conv1D(9, 7),
        "embed": nn.Embedding(20, 6),
        "wpe": nn.Embedding(16, 6),
        "both": nn.Bilinear(4, 5, 6),
        "norm": nn.LayerNorm((8, 8)),
    })
    shapes = {
        "up.weight": (9, 6, 8),
        "up1.weight": (5, 6, 8),
        "one.weight": (5, 6, 8),
        "wide.weight": (40, 6, 8),
        "normed.weight": (9, 6, 8),
        "gpt.weight": (1, 9, 7),
        "embed.weight": (1, 6, 20),
        "both.weight": (1, 6, 20),
    }
    assert axes_of(model) == shapes
    assert axes_of(nn.DataParallel(torch.compile(model.to(torch.bfloat16)))) == shapes
    del model["normed"], shapes["normed.weight"]  # Torch saves its state alone
    torch.save({"model": model}, tmp_path / "whole.pt")
    assert axes_of(tmp_path / "whole.pt") == shapes


def test_models_in_memory_are_those_of_files(tmp_path):
    model = nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 48))
    model.register_buffer("mask", torch.ones(32, 32))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    quick = {"resamples": 0, "randomize": False}
    for other in (model, torch.export.export(model, (torch.ones(1, 40),)), {"model": model.state_dict()}):
        diagnosis = diagnose(other, exclude="mask" if other is not model else (), **quick)
        file = diagnose(tmp_path / "model.pt", exclude="mask", **quick)
        assert diagnosis.column("alpha") == file.column("alpha")
        assert diagnosis.names == file.names
    assert dict(diagnose(model, **quick).left_out)["mask"] == "mask"
    with pytest.raises(InputError, match="no layer to measure"):
        diagnose(nn.Linear(40, 32, device="meta"))


def test_an_adapter_in_bin(tmp_path):
    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    safetensors.torch.save_file({"up.weight": weight}, tmp_path / "model.safetensors")
    (adapter := tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.up.lora_{part}.weight": factor for part, factor in (("A", a), ("B", b))}
    torch.save(factors, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    with LoraSource(open_weights(tmp_path / "model.safetensors"), adapter) as source:
        np.testing.assert_allclose(source.read("up.weight"), weight + 1.5 * b @ a, rtol=1e-5, atol=1e-5)


class Quantised(torch.Tensor):
    """Stands for a tensor of torchao's."""


def test_tensors_of_another_packages_class_are_refused_with_the_remedy(tmp_path):
    torch.save({"up.weight": torch.ones(8, 6).as_subclass(Quantised)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: it has tensors of another package's class.*dequantize"):
        open_weights(tmp_path / "weights.pt")
