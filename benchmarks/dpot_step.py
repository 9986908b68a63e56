"""Time a training step of DPOT against the same network in PyTorch, and the spectral refresh against a plain loop.

    python -m benchmarks.dpot_step --repeats 7

A step is forward, backward and an update of Adam (betas 0.9, weight decay 1e-6 in the gradient, gradient clipped) on
one batch of random fields, float32; ours is `sciml.steps.make_step`, as `python -m sciml.dpot` runs it. A refresh is
the analysis of every Linear and Conv2d by FARMS windows and the layers' new rates, which the paper times in Table 12;
the loop takes one `torch.linalg.svdvals` per window.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import farms_jax
from benchmarks._common import interleave, machine, timed, write
from benchmarks.spectral import exact_alphas, torch_layout, torch_loop
from benchmarks.torch_dpot import TorchDPOT
from sciml.balanced_layers import NOT_IN_REFERENCE, spectral_view
from sciml.checkpoints import to_torch
from sciml.config import Config, resolve
from sciml.model import NAMED, ModelConfig, make_network
from sciml.optimizer import BETAS, make_optimizer
from sciml.steps import TrainState, make_step

WINDOW = farms_jax.Window(per_axis=9, min_division=1)


def main() -> None:
    """Run the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(NAMED), help="network of the training step")
    parser.add_argument("--batch", type=int, default=8, help="trajectories in a step")
    parser.add_argument("--refresh", nargs="+", default=["tiny", "small"], choices=sorted(NAMED))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each")
    parser.add_argument("--json", default="benchmarks/results/dpot_step.json", help="file for the results, JSON")
    args = parser.parse_args()

    torch.set_num_threads(machine()["cores"])  # JAX takes all cores; there is no switch for less
    step = time_step(NAMED[args.model], args.batch, args.repeats)
    times = ", ".join(f"{name} {1e3 * step[name]:.0f} ms" for name in ("ours", "torch"))
    print(f"step of {args.model}, batch {args.batch}: {times}, torch / ours {step['ratio']:.2f}")
    print(f"loss of the first step: ours {step['loss']['ours']:.6f}, torch {step['loss']['torch']:.6f}")
    refresh = {name: time_refresh(NAMED[name], args.repeats) for name in args.refresh}
    print(f"{'refresh':10}{'first':>8}{'ours':>8}{'loop':>8}{'loop/ours':>11}{'difference':>12}")
    for name, row in refresh.items():
        numbers = f"{row['first']:8.2f}{row['ours']:8.3f}{row['loop']:8.3f}{row['ratio']:11.1f}"
        print(f"{name:10}{numbers}{row['max_relative_difference_of_alpha']:12.0e}")
    write(args.json, {"machine": machine(), "settings": vars(args), "step": step, "refresh": refresh})
    print(f"written to {args.json}")


def time_step(model: ModelConfig, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, medians, their ratio, and the loss of the first step of both."""
    network = make_network(model)
    params = jax.jit(network.init)(jax.random.key(0))
    shape = (batch, model.image_size, model.image_size, model.in_steps + 1, model.in_channels)
    fields = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    ours, our_loss = our_step(model, network, params, fields)
    theirs, their_loss = torch_step(model, params, fields)
    seconds = interleave({"ours": ours, "torch": theirs}, repeats)
    medians = {name: median(values) for name, values in seconds.items()}
    ratio = medians["torch"] / medians["ours"]
    return {**medians, "ratio": ratio, "loss": {"ours": our_loss(), "torch": their_loss()}, "seconds": seconds}


def our_step(model: ModelConfig, network: Any, params: Any, fields: np.ndarray) -> tuple[Callable[[], None], Any]:
    """Return a call of one step, and one that gives the loss of the first, a mean over the batch."""
    config = resolve(Config(data="random", epochs=100, schedule="step", learning_rate=1e-4, in_steps=model.in_steps))
    optimizer = make_optimizer(config, steps_per_epoch=100)
    step = make_step(network, optimizer, config)
    state = TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params))  # donated, hence a copy
    on_device, weights, losses = jnp.asarray(fields), jnp.ones(len(fields)), []

    def call() -> None:
        nonlocal state
        state, loss = step(state, jax.random.key(0), on_device, weights)
        losses.append(float(loss[0]) / len(fields))
        jax.block_until_ready(state)

    return call, lambda: losses[0]


def torch_step(model: ModelConfig, params: Any, fields: np.ndarray) -> tuple[Callable[[], None], Any]:
    """Return the same of PyTorch."""
    network = TorchDPOT(model)
    network.load_state_dict({key: torch.tensor(value) for key, value in to_torch(params, model).items()})
    # Torch's Adam has the same L2 in the gradient; a fused update is its fastest.
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, betas=BETAS, weight_decay=1e-6, fused=True)
    seen, true = torch.from_numpy(fields).split([model.in_steps, 1], dim=-2)
    losses = []

    def call() -> None:
        optimizer.zero_grad()
        predicted, _ = network(seen)
        error = torch.linalg.vector_norm(predicted - true, dim=(1, 2, 3))
        loss = (error / (torch.linalg.vector_norm(true, dim=(1, 2, 3)) + 1e-8)).mean(-1).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1e4)
        optimizer.step()
        losses.append(float(loss.detach()) / len(fields))

    return call, lambda: losses[0]


def time_refresh(model: ModelConfig, repeats: int) -> dict[str, float]:
    """Seconds of a refresh, medians, the ratio, and how far the loop's alphas, in float64, are from ours."""
    params = jax.jit(make_network(model).init)(jax.random.key(0))
    opt_state = farms_jax.tempbalance(refresh_every=None).init(params)
    scale_of = jax.jit(farms_jax.lr_scale)

    def ours() -> farms_jax.LayerReport:
        report = farms_jax.analyze(spectral_view(params), window=WINDOW, exclude=NOT_IN_REFERENCE)
        jax.block_until_ready(farms_jax.refresh(opt_state, scale_of(report, params)))
        return report

    report, first = timed(ours)
    leaves = {name: np.asarray(leaf) for name, leaf in farms_jax.named_leaves(params) if name in report.names}
    layers = {name: torch.from_numpy(torch_layout(leaves[name])) for name in report.names}
    seconds = interleave({"ours": ours, "loop": lambda: torch_loop(layers, "median")}, repeats)
    exact = np.array(exact_alphas(layers, "median"))
    medians = {name: median(values) for name, values in seconds.items()}
    difference = np.abs(np.asarray(report.alpha) / exact - 1).max()
    return {
        "first": first,
        **medians,
        "ratio": medians["loop"] / medians["ours"],
        "max_relative_difference_of_alpha": float(difference),
    }


if __name__ == "__main__":
    main()
