"""Training of the weights that stay in a pruned block: what it reaches, what it leaves alone, and when it stops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few
from prune_helpers import Killed, assert_same_run, numbers_of, small_run, weights_of

import prune.writing
from prune.allocation import Plan
from prune.forward import apply_block, embed
from prune.job import prepare
from prune.models import make_network
from prune.pruning import prune_blocks
from prune.recovery import HALVES, Recovery, recover_block
from prune.run import run
from tests.prune_helpers import config_of, state_of

RECOVERY = Recovery(steps=10, rate=3e-3, seed=0)


def recovered(read, network, calibration, first=0, **changes):
    """Blocks from `first` on, pruned and trained, by number."""
    plan = Plan("magnitude", dict.fromkeys(network.layer_shapes(), 0.6), recovery=RECOVERY._replace(**changes))
    blocks = {}
    prune_blocks(network, read, plan, blocks.__setitem__, calibration=calibration, first=first)
    return blocks


@pytest.mark.parametrize("model", few(["llama_tiny", "opt_tiny"], 1))
def test_halves_get_nearer_to_the_dense_ones_and_removed_weights_stay_removed(model):
    dense, network = weights_of(model), make_network(config_of(model, num_hidden_layers=2))
    calibration = numbers_of("llama_tiny")[0]["ids"][:3] % network.vocab_size
    blocks = recovered(dense.__getitem__, network, calibration)
    for number, block in blocks.items():
        assert set(block.recovered) == set(HALVES)
        assert max(block.recovered.values()) < 0.9
        linears = {f"{layer}.weight": mask for layer, mask in block.masks.items()}
        for name, tensor in block.tensors.items():
            changed = (tensor != dense[name]) & linears.get(name, True)
            assert not tensor[~linears.get(name, np.ones(tensor.shape, bool))].any()
            assert changed.any() == (name in linears), name
        if number:
            continue
        # The first block's inputs are the embedded tokens; the figure is for its output as a whole.
        x = jnp.asarray(embed(network, dense.__getitem__, calibration).read(slice(0, 3)))
        goal, found = (apply_block(network, state_of(network, 0, t), x) for t in (dense, dense | block.tensors))
        magnitude = {name: dense[name] * mask for name, mask in linears.items()}
        before = apply_block(network, state_of(network, 0, dense | magnitude), x)
        assert np.square(found - goal).sum() < np.square(before - goal).sum()
    # A run that goes on after a written block.
    again = recovered((dense | blocks[0].tensors).__getitem__, network, calibration, first=1)
    for name, tensor in blocks[1].tensors.items():
        np.testing.assert_array_equal(again[1].tensors[name], tensor)


def test_a_half_that_lost_nothing_or_would_get_worse_stays_as_it_is():
    dense, network = weights_of("llama_tiny"), make_network(config_of("llama_tiny"))
    activations = embed(network, dense.__getitem__, numbers_of("llama_tiny")[0]["ids"][:3])
    tensors = {name: dense[name] for name in network.tensors(0)}
    masks = {
        network.layer_name(0, name): tensors[f"{network.layer_name(0, name)}.weight"] != 0 for name in network.linears
    }
    layer = network.layer_name(0, "mlp.up_proj")
    masks[layer] = np.abs(tensors[f"{layer}.weight"]) > 0.01
    pruned = tensors | {f"{layer}.weight": tensors[f"{layer}.weight"] * masks[layer]}
    found, errors = recover_block(network, 0, tensors, pruned, masks, activations, 3, RECOVERY._replace(rate=10.0))
    assert errors == {"feed-forward": 1.0}
    for name, tensor in pruned.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    config = small_run(tmp_path, method="admm", allocation="uniform", recover="blocks", recover_steps=10)
    expected = prepare(config)
    run(expected)
    kept = prune.writing.Output.write

    def killed_at_the_third_block(output, tensors, masks=None):
        if any(".layers.2." in name for name in masks or ()):
            raise Killed
        return kept(output, tensors, masks)

    job = prepare(dataclasses.replace(config, out=tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prune.writing.Output, "write", killed_at_the_third_block)
        run(job)
    run(job)
    assert_same_run(job.path, expected.path)
