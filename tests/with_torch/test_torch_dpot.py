"""A fine-tuning of some steps against torch: network, loss, clipping, Adam, and the one-cycle and step schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.dpot_step import time_refresh, time_step
from benchmarks.torch_dpot import TorchDPOT
from sciml.checkpoints import to_torch
from sciml.config import Config, resolve
from sciml.model import ModelConfig, make_network
from sciml.optimizer import make_optimizer
from sciml.steps import TrainState, make_step

MODEL = ModelConfig(image_size=8, patch_size=2, in_steps=3, width=16, depth=2, num_blocks=2, modes=2, out_width=8)
STEPS, PER_EPOCH = 12, 3


@pytest.mark.parametrize("normalize", [False, True])
def test_the_peer_is_the_same_network(normalize):
    model = dataclasses.replace(MODEL, normalize=normalize, modes=3, mlp_ratio=2.0)
    network = make_network(model)
    params = network.init(jax.random.key(0))
    peer = TorchDPOT(model)
    peer.load_state_dict({key: torch.tensor(value) for key, value in to_torch(params, model).items()})
    fields = np.random.default_rng(0).standard_normal((2, 8, 8, 3, 4), dtype=np.float32)
    for ours, theirs in zip(network.apply(params, fields), peer(torch.from_numpy(fields)), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)


@pytest.mark.parametrize("schedule", ["cycle", "step"])
def test_steps_are_torchs(schedule):
    config = resolve(
        Config(
            epochs=4,
            warmup_epochs=1,
            schedule=schedule,
            step_size=2,
            learning_rate=1e-2,
            in_steps=3,
            weight_decay=1e-2,
            clip=0.5,
        )
    )
    network = make_network(MODEL)
    params = network.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((STEPS, 2, 8, 8, 4, 4)).astype(np.float32)

    optimizer = make_optimizer(config, PER_EPOCH)
    step = make_step(network, optimizer, config)
    state = TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params))
    for batch in batches:
        state, _ = step(state, jax.random.key(0), batch, np.ones(2, np.float32))

    peer = torch_steps(config, to_torch(params, MODEL), batches)
    ours = to_torch(state.params, MODEL)
    before = to_torch(params, MODEL)
    for name, theirs in peer.items():
        moved = np.abs(theirs - before[name]).max()
        np.testing.assert_allclose(ours[name], theirs, atol=2e-3 * moved + 1e-6, err_msg=name)
        assert moved > 1e-3 or name.startswith("cls_head"), name


def torch_steps(config, state, batches):
    """State after torch's steps, with its scheduler called as DPOT calls it."""
    peer = TorchDPOT(MODEL)
    peer.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    optimizer = torch.optim.Adam(peer.parameters(), config.learning_rate, betas=(0.9, 0.9), weight_decay=1e-2)
    if config.schedule == "cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-2, div_factor=1e4, final_div_factor=1e4, pct_start=0.25, steps_per_epoch=PER_EPOCH, epochs=4
        )
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2 * PER_EPOCH, 0.5)
    for batch in torch.from_numpy(batches):
        seen, true = batch.split([3, 1], dim=-2)
        predicted, _ = peer(seen)
        flat = [x.flatten(1, 3) for x in (predicted - true, true)]
        loss = (flat[0].norm(dim=1) / (flat[1].norm(dim=1) + 1e-8)).mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
    return {name: value.numpy() for name, value in peer.state_dict().items()}


def test_the_benchmark_compares_like_with_like():
    model = dataclasses.replace(MODEL, in_steps=3)
    losses = time_step(model, batch=2, repeats=1)["loss"]
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-5)
    assert time_refresh(model, repeats=1)["max_relative_difference_of_alpha"] < 1e-4
