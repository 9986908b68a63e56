"""The training of a pruned block does what PyTorch's AdamW does."""

import json
import math

import numpy as np
import torch
from prune_helpers import DATA, numbers_of, weights_of

from benchmarks.torch_prune import LINEARS, TorchBlock
from prune.forward import embed
from prune.models import make_network
from prune.recovery import Recovery, recover_block

CONFIG = json.loads((DATA / "llama_tiny" / "config.json").read_text())
STEPS, RATE, RISE = 12, 3e-3, 1  # a tenth of the steps in which the rate rises


def rate_at(step):
    return 0.0 if step < RISE else RATE * (1 + math.cos(math.pi * (step - RISE) / (STEPS - RISE))) / 2


def expected(block, goal, masks, x):
    """Weights by linear after training, in float64, and each half's error relative to that before."""

    def attention(block):
        return block._attention(block.input_layernorm(x))

    def all_of_it(block):
        return block(x)

    errors = []
    for names, output in ((LINEARS[:4], attention), (LINEARS[4:], all_of_it)):
        weights = [block.get_parameter(f"{name}.weight") for name in names]
        if output is all_of_it:  # behind the attention that was trained
            goal.self_attn = block.self_attn
        with torch.no_grad():
            target = output(goal)
            before = (output(block) - target).square().sum()
        optimiser = torch.optim.AdamW(weights, weight_decay=0)
        for step in range(STEPS):
            optimiser.param_groups[0]["lr"] = rate_at(step)
            optimiser.zero_grad()
            ((output(block) - target).square().sum() / before).backward()
            for name, weight in zip(names, weights, strict=True):
                weight.grad *= masks[name]
            optimiser.step()
        with torch.no_grad():
            errors.append(float((output(block) - target).square().sum() / before))
    return {name: block.get_parameter(f"{name}.weight").detach().numpy() for name in LINEARS}, errors


def test_recovery_is_training_by_torch():
    dense, network = weights_of("llama_tiny"), make_network(CONFIG)
    activations = embed(network, dense.__getitem__, numbers_of("llama_tiny")[0]["ids"][:3])
    tensors = {name: dense[name] for name in network.tensors(0)}
    random = np.random.default_rng(0)
    masks = {name: random.random(tensors[f"{network.layer_name(0, name)}.weight"].shape) < 0.5 for name in LINEARS}
    by_layer = {network.layer_name(0, name): mask for name, mask in masks.items()}
    pruned = tensors | {f"{layer}.weight": tensors[f"{layer}.weight"] * mask for layer, mask in by_layer.items()}
    recovery = Recovery(STEPS, RATE, seed=0)
    found, errors = recover_block(network, 0, tensors, pruned, by_layer, activations, 3, recovery)
    blocks = [TorchBlock(CONFIG, values, 0).double() for values in (pruned, tensors)]
    kept = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    wanted, ratios = expected(*blocks, kept, torch.from_numpy(activations.read(slice(0, 3))).double())
    assert np.allclose(list(errors.values()), ratios, rtol=1e-3)
    assert max(ratios) < 0.9
    for name, weight in wanted.items():
        np.testing.assert_allclose(found[f"{network.layer_name(0, name)}.weight"], weight, atol=2e-4, err_msg=name)
