"""Weights that Torch stores as factors: what is read is the weight that the module computes with in evaluation."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from farms_jax.diagnosis.in_memory import open_in_memory
from farms_jax.weights import open_weights


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.4)
    return module


def symmetric(module):
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


KNOWN = {
    "kernel": lambda: weight_norm(nn.Conv2d(3, 5, 3)),
    "positions": lambda: weight_norm(nn.Conv1d(3, 5, 4), dim=2),
    "whole": lambda: weight_norm(nn.Linear(4, 6), dim=None),
    "transposed": lambda: weight_norm(nn.ConvTranspose1d(3, 5, 4), dim=1),
    "new": lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 5), dim=2),
    "new_whole": lambda: parametrizations.weight_norm(nn.Linear(4, 6), dim=None),
    "spectral": lambda: spectral_norm(nn.Linear(4, 4)),
    "new_spectral": lambda: parametrizations.spectral_norm(nn.Linear(4, 6)),
    "spectral_transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
    "pruned": lambda: pruned(nn.Linear(4, 6)),
}
UNKNOWN = {
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 6)),
    "symmetric": lambda: symmetric(nn.Linear(4, 4)),
    "both": lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 6))),
}
INPUTS = {
    nn.Conv2d: (1, 3, 5, 5),
    nn.ConvTranspose2d: (1, 4, 5, 5),
    nn.ConvTranspose1d: (1, 3, 6),
    nn.Linear: (2, 4),
}


def trained(modules):
    """Modules whose parameters have moved since their norms were computed, and their weights in evaluation."""
    torch.manual_seed(0)
    net = nn.ModuleDict({name: make() for name, make in modules.items()})
    weights = {}
    for step in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
        net.train(step == 0)
        for name, module in net.items():
            kind = next((shape for kind, shape in INPUTS.items() if isinstance(module, kind)), None)
            shape = kind or (1, module.in_channels, 6)
            module(torch.randn(shape))  # which renews the weights that hooks make
            weights[f"{name}.weight"] = module.weight.detach().double().numpy()
    return net.train(), weights


def check(source, weights):
    left_out = {**source.skipped, **source.unread}
    matrices = {name for name, info in source.tensors.items() if len(info.shape) > 1 and name not in left_out}
    assert matrices == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(source.read(name), weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_weights_of_modules_are_those_that_they_compute_with():
    net, weights = trained(KNOWN | UNKNOWN)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    check(open_in_memory(net), weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("form", ["memory", "safetensors", "pt"])
def test_names_and_shapes_of_files_tell_the_rule(tmp_path, form):
    net, weights = trained(KNOWN)
    path, state = tmp_path / f"model.{form}", net.state_dict()
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    elif form == "pt":
        torch.save(state, path)
    check(open_in_memory(state) if form == "memory" else open_weights(path), weights)


def test_a_rule_that_only_code_tells_is_left_out_with_the_reason():
    source = open_in_memory(trained(UNKNOWN)[0].state_dict())
    check(source, {})
    originals = {"orthogonal": "original", "symmetric": "original", "both": "original1"}
    for name, own in originals.items():
        assert "remove_parametrizations" in source.unread[f"{name}.parametrizations.weight.{own}"]
