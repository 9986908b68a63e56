"""Time one training step of our ResNet against the same network in PyTorch, on the CPU.

    python -m benchmarks.train_step --depth 18 --width 1.0 --batch 128 --steps 7

A step is forward, backward and an update of SGD with momentum 0.9 and weight decay 5e-4, all in float32, on one
batch of random images of 32 x 32. Ours is timed as a single jitted step and within a loop, as an epoch runs it.
Beside it the spectral refresh of all layers (analysis, mapping, new factors), as a share of an epoch of 50,000 images.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn import functional

import farms_jax
from benchmarks._common import interleave, machine, write
from train.config import Config, resolve
from train.cpu_gradients import compiler_options
from train.resnet import STAGES, ResNet
from train.steps import Normalise, TrainState, make_network, make_optimizer, make_steps

SCANNED = 3  # steps of one loop
LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4


def main() -> None:
    """Run the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=18, choices=sorted(STAGES))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7, help="timed calls of each")
    parser.add_argument("--json", default="benchmarks/results/train_step.json", help="file for the results, JSON")
    args = parser.parse_args()

    cores = machine()["cores"]
    torch.set_num_threads(cores)  # JAX takes all cores; there is no switch for less
    generator = np.random.default_rng(0)
    images = generator.standard_normal((args.batch, 32, 32, 3), dtype=np.float32)
    labels = generator.integers(0, 10, args.batch)
    steps = our_steps(args.depth, args.width, images, labels)
    steps["torch"] = torch_step(args.depth, args.width, images, labels)
    refresh_seconds = median(interleave({"refresh": our_refresh(args.depth, args.width)}, args.steps)["refresh"])
    seconds = interleave(steps, args.steps)
    seconds["ours, scan"] = [s / SCANNED for s in seconds["ours, scan"]]

    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {name: medians["torch"] / value for name, value in medians.items()}
    print(f"{'':12}{'ms/step':>10}{'torch/this':>12}")
    for name, value in medians.items():
        print(f"{name:12}{1e3 * value:10.0f}{ratios[name]:12.2f}")
    share = refresh_seconds / (50_000 // args.batch * medians["ours, scan"])
    print(f"refresh     {1e3 * refresh_seconds:10.0f}   {100 * share:.3f} % of an epoch")
    settings = {**vars(args), "threads": cores, "scanned": SCANNED, "dtype": "float32"}
    results = {"seconds": seconds, "torch_over": ratios, "refresh": refresh_seconds, "refresh_share": share}
    write(args.json, {"machine": machine(), "settings": settings, **results})
    print(f"written to {args.json}")


def our_steps(depth: int, width: float, images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], None]]:
    """Return calls of one step, and of the steps of an epoch as `train.cifar` runs them, by name."""
    model = ResNet(depth, 10, width, rngs=nnx.Rngs(0))
    model.train()
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    tx = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LEARNING_RATE, MOMENTUM))

    def loss_of(params, stats, x, y):
        model = nnx.merge(graph, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]

    @functools.partial(jax.jit, compiler_options=compiler_options(), donate_argnums=0)
    def step(carry, batch):
        params, stats, opt_state = carry
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    batch = (jnp.asarray(images), jnp.asarray(labels))
    # Donated, hence a copy, and kept from call to call.
    carry = jax.tree.map(jnp.copy, (params, stats, tx.init(params)))

    def call() -> None:
        nonlocal carry
        carry, loss = step(carry, batch)
        jax.block_until_ready((carry, loss))

    return {"ours, step": call, "ours, scan": our_epoch(depth, width, labels)}


def our_epoch(depth: int, width: float, labels: np.ndarray) -> Callable[[], None]:
    """Return a call of SCANNED steps within one loop, on images of one byte a channel."""
    settings = {"model": f"resnet{depth}", "width": width, "learning_rate": LEARNING_RATE, "batch_size": len(labels)}
    config = resolve(dataclasses.replace(Config(), **settings, augment=False), small=False)
    network, optimizer = make_network(config, 10), make_optimizer(config, SCANNED)
    steps = make_steps(network, optimizer, Normalise(jnp.full(3, 0.5), jnp.full(3, 0.25)), config)
    shape = (SCANNED * len(labels), 32, 32, 3)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    params, stats = network.init(jax.random.key(0))
    state, answers = TrainState(params, stats, optimizer.init(params)), jnp.asarray(np.tile(labels, SCANNED))

    def call() -> None:
        nonlocal state
        piece = steps(state, np.zeros(2, np.float32), jax.random.key(1), 0, SCANNED, images, answers)
        state = jax.block_until_ready(piece).state
        assert piece.is_finite  # else it ended early

    return call


def our_refresh(depth: int, width: float) -> Callable[[], None]:
    """Return a call of one spectral refresh."""
    params = nnx.state(ResNet(depth, 10, width, rngs=nnx.Rngs(0)), nnx.Param)
    opt_state = farms_jax.tempbalance(refresh_every=None).init(params)
    scale_of = jax.jit(farms_jax.lr_scale)

    def call() -> None:
        report = farms_jax.analyze(params, window=farms_jax.Window(per_axis=9))
        jax.block_until_ready(farms_jax.refresh(opt_state, scale_of(report, params)))

    return call


def torch_step(depth: int, width: float, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """Return a call of one step in PyTorch."""
    model = torch_resnet(depth, width)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=DECAY)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels)

    def call() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return call


def torch_resnet(depth: int, width: float) -> torch.nn.Module:
    """Build the network of `train.resnet` for images (N, 3, 32, 32)."""
    base = round(64 * width)
    parts: list[torch.nn.Module] = [*_conv_norm(3, base, 3), torch.nn.ReLU()]
    inputs = base
    for stage, blocks in enumerate(STAGES[depth]):
        for index in range(blocks):
            block = Residual(inputs, base * 2**stage, 2 if stage and not index else 1, bottleneck=depth >= 50)
            parts.append(block)
            inputs = block.outputs
    return torch.nn.Sequential(*parts, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(inputs, 10))


class Residual(torch.nn.Module):
    """A block of two 3 x 3 convolutions, or of 1 x 1, 3 x 3 and 1 x 1 ones."""

    def __init__(self, inputs: int, planes: int, stride: int, *, bottleneck: bool) -> None:
        """Build a block from `inputs` to `planes` (four times as many with `bottleneck`) channels."""
        super().__init__()
        relu = torch.nn.ReLU()
        if bottleneck:
            self.outputs = 4 * planes
            parts = [*_conv_norm(inputs, planes, 1), relu, *_conv_norm(planes, planes, 3, stride), relu]
            self.body = torch.nn.Sequential(*parts, *_conv_norm(planes, self.outputs, 1))
        else:
            self.outputs = planes
            parts = [*_conv_norm(inputs, planes, 3, stride), relu, *_conv_norm(planes, planes, 3)]
            self.body = torch.nn.Sequential(*parts)
        same = stride == 1 and inputs == self.outputs
        self.shortcut = torch.nn.Sequential(*([] if same else _conv_norm(inputs, self.outputs, 1, stride)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, outputs, H / stride, W / stride) for x (N, inputs, H, W)."""
        return functional.relu(self.body(x) + self.shortcut(x))


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> list[torch.nn.Module]:
    convolution = torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [convolution, torch.nn.BatchNorm2d(outputs)]


if __name__ == "__main__":
    main()
