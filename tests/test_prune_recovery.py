"""Training of the weights that stay in a pruned block: what it reaches, what it leaves alone, and when it stops."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few
from prune_helpers import Killed, assert_same_run, config_of, logits_of, numbers_of, small_run, state_of, weights_of

import prune.fine_tuning
import prune.writing
from prune.allocation import Plan
from prune.fine_tuning import FineTuning, fine_tune
from prune.forward import apply_block, embed
from prune.job import prepare
from prune.models import make_network
from prune.pruning import prune_blocks
from prune.recovery import HALVES, Recovery, recover_block
from prune.run import run

RECOVERY = Recovery(steps=10, rate=3e-3, seed=0)


def recovered(read, network, calibration, first=0, **changes):
    """Blocks from `first` on, pruned and trained, by number."""
    plan = Plan("magnitude", dict.fromkeys(network.layer_shapes(), 0.6), recovery=RECOVERY._replace(**changes))
    blocks = {}
    prune_blocks(network, read, plan, blocks.__setitem__, calibration=calibration, first=first)
    return blocks


@pytest.mark.parametrize("model", few(["llama_tiny", "opt_tiny"], 2))
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


# --- The whole model -------------------------------------------------------------------------------------------------


def stop_at(patch, module, name, number):
    """Let the process end at a call of a function, counted from 1."""
    calls, original = itertools.count(1), getattr(module, name)

    def call(*arguments, **keywords):
        if next(calls) == number:
            raise Killed
        return original(*arguments, **keywords)

    patch.setattr(module, name, call)


def mean_loss(network, tensors, ids):
    logits = np.float64(logits_of(network, tensors, ids))[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], 2)[..., 0]
    return losses.mean()


@pytest.mark.parametrize("kind", few(["lora", "full"], 2))
def test_a_whole_model_is_trained_under_its_masks_and_goes_on_after_a_stop(kind, tmp_path, monkeypatch):
    dense, network = weights_of("llama_tiny"), make_network(config_of("llama_tiny", num_hidden_layers=2))
    names = [network.layer_name(block, linear) for block in range(2) for linear in network.linears]
    masks = {name: np.abs(dense[f"{name}.weight"]) > np.median(np.abs(dense[f"{name}.weight"])) for name in names}
    pruned = dense | {f"{name}.weight": dense[f"{name}.weight"] * mask for name, mask in masks.items()}
    ids, tuning = numbers_of("llama_tiny")[0]["ids"][:3], FineTuning(kind, 5, 5e-3, seed=0)
    monkeypatch.setattr(prune.fine_tuning, "_EVERY", 2)

    def trained(path):
        blocks = fine_tune(network, pruned.__getitem__, masks, ids, tuning, path)
        return {name: weight for _, block in blocks for name, weight in block.items()}

    found = trained(tmp_path / "through")
    assert set(found) == {f"{name}.weight" for name in names}
    for name, mask in masks.items():
        weight, before = found[f"{name}.weight"], pruned[f"{name}.weight"]
        assert not weight[~mask].any()
        assert (weight[mask] != before[mask]).mean() > 0.9, name
    assert mean_loss(network, pruned | found, ids) < mean_loss(network, pruned, ids) - 0.1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, prune.fine_tuning, "_step", 4)
        trained(tmp_path / "stopped")
    again = trained(tmp_path / "stopped")
    for name, weight in found.items():
        np.testing.assert_array_equal(again[name], weight)


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recover", "module", "function", "number"),
    [
        ("blocks", prune.writing, "WrittenBlock", 3),
        ("full", prune.fine_tuning, "_save", 2),
        # 3 outside the blocks, 4 blocks, and the first of those that were trained.
        ("lora", prune.writing.Output, "write", 9),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(recover, module, function, number, tmp_path, monkeypatch):
    monkeypatch.setattr(prune.fine_tuning, "_EVERY", 4)
    config = small_run(tmp_path, method="admm", allocation="uniform", recover=recover, recover_steps=10)
    expected = prepare(config)
    run(expected)
    job = prepare(dataclasses.replace(config, out=tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, module, function, number)
        run(job)
    run(job)
    assert_same_run(job.path, expected.path)
