"""Recovery: the weights that stay in a pruned block are trained until its halves do again what they did dense.

Attention first, then the feed-forward network: each is trained with AdamW on the inputs that reach the block, against
the outputs of the same half with its dense weights. Removed weights stay removed.

References:
    arXiv:2510.14444: after pruning, halves trained one by one end better than whole models, for far less.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .forward import TOKENS, Activations, Tensors
from .models import Network, State
from .models.operations import linear

Half = Literal["attention", "feed-forward"]
HALVES: tuple[Half, ...] = ("attention", "feed-forward")
_WARM_UP = 0.1  # share of the steps in which the rate rises to its peak; a cosine then takes it down to 0


class Recovery(NamedTuple):
    """How the weights that stay are trained."""

    steps: int  # for each half of a block
    rate: float  # learning rate of AdamW at its peak
    seed: int  # of the order of the sequences


def recover_block(
    network: Network,
    block: int,
    dense: Tensors,
    pruned: Tensors,
    masks: Mapping[str, np.ndarray],
    activations: Activations,
    count: int,
    recovery: Recovery,
    spill: Path | None = None,
) -> tuple[Tensors, dict[str, float]]:
    """Return a pruned block's tensors after training, as stored, and the error of each half that was trained.

    `masks` are (out, in) by layer, True where a weight stays. The first `count` sequences of `activations`, inputs of
    the block, are trained on; errors are of these, the squared distance to the dense half's outputs relative to that
    before the training. A half that has lost no weight, or would end no better, stays as it was.
    """
    goal, state = network.to_state(block, dense), network.to_state(block, pruned)
    trained, errors = dict(pruned), {}
    for half in HALVES:
        layers = {name: network.layer_name(block, name) for name in _linears(network, half)}
        if all(masks[layer].all() for layer in layers.values()):
            continue
        weights = {f"{name}.weight": state[f"{name}.weight"] for name in layers}
        kept = {f"{name}.weight": jnp.asarray(masks[layer].T) for name, layer in layers.items()}
        task = _Task(network, half, state, {**state, **{name: goal[name] for name in weights}})
        order = np.random.default_rng([recovery.seed, block, HALVES.index(half)])
        found, errors[half] = _train(task, weights, kept, activations, count, recovery, order, spill)
        state = {**state, **found}
        for name, layer in layers.items():
            stored = trained[f"{layer}.weight"]
            values = np.asarray(found[f"{name}.weight"]).T.astype(stored.dtype)
            trained[f"{layer}.weight"] = np.where(masks[layer], values, np.zeros((), stored.dtype))
    return trained, errors


class _Task(NamedTuple):
    """What is trained for: a half of a block is to give the outputs of the dense one."""

    network: Network
    half: Half
    state: State  # of the block, whose own weights for this half are replaced by those in training
    goal: State  # the same with this half's dense weights


def _linears(network: Network, half: Half) -> list[str]:
    """Return the names of a half's linears; the last one's output is that of the half."""
    # self_attn.q_proj, attention.dense, attn.c_proj; mlp.up_proj, fc1.
    return [name for name in network.linears if ("att" in name.partition(".")[0]) == (half == "attention")]


def _train(
    task: _Task,
    weights: State,
    kept: Mapping[str, Array],
    activations: Activations,
    count: int,
    recovery: Recovery,
    random: np.random.Generator,
    spill: Path | None,
) -> tuple[State, float]:
    """Return the trained weights, (in, out) by name as in a state, and their error relative to that before."""
    network, half = task.network, task.half
    length, slices = activations.shape[1], batches_of(count, activations.shape[1])
    targets = Activations((count, length, network.hidden_size), spill)
    for rows in slices:
        targets.write(rows, np.asarray(_outputs(network, half, task.goal, activations.read(rows))))

    def error(weights: State) -> float:
        return sum(
            float(_squares(network, half, task.state, weights, activations.read(rows), targets.read(rows)))
            for rows in slices
        )

    if not (before := error(weights)) > 0:  # only inputs that are always zero have lost weights
        return weights, 1.0
    optimiser = optimiser_of(recovery.steps, recovery.rate)
    found = jax.tree.map(jnp.copy, weights)  # each step overwrites them
    moments = optimiser.init(found)
    for rows in shuffled(slices, recovery.steps, random):
        x, target = activations.read(rows), targets.read(rows)
        found, moments = _step(network, half, optimiser, task.state, found, moments, kept, x, target, count / before)
    ratio = error(found) / before
    return (found, ratio) if ratio < 1 else (weights, 1.0)


def batches_of(count: int, length: int) -> list[slice]:
    """Return slices of `count` sequences of `length` tokens that are trained on at once."""
    size = max(1, TOKENS // length)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def shuffled(slices: list[slice], steps: int, random: np.random.Generator) -> Iterable[slice]:
    """Yield a slice for every step: all of them in one order, then in another."""
    order: list[int] = []
    for _ in range(steps):
        order = order or random.permutation(len(slices)).tolist()
        yield slices[order.pop()]


@functools.cache  # one object for each setting: it is a static argument of a jitted function
def optimiser_of(steps: int, rate: float) -> optax.GradientTransformation:
    """Return AdamW without decay of weights, whose rate rises to `rate` and falls to 0 in so many steps."""
    rise = max(int(_WARM_UP * steps), 1)
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, rise, max(steps, rise + 1)), weight_decay=0.0)


@functools.partial(jax.jit, static_argnames=("network", "half"))
def _outputs(network: Network, half: Half, state: State, x: Array) -> Array:
    """Return a half's output (B, T, D) for the block's input (B, T, D).

    That of the feed-forward network comes with the residual stream, which is the same whatever its weights are: so it
    needs no name, and experts may share the work.
    """
    if half == "feed-forward":
        return network.block(state, x)
    last = _linears(network, half)[-1]
    with jax.default_matmul_precision("highest"):
        return linear(state, last, network.inputs(state, x)[last])


@functools.partial(jax.jit, static_argnames=("network", "half"))
def _squares(network: Network, half: Half, state: State, weights: State, x: Array, target: Array) -> Array:
    """Return the squared distance of a half's outputs, under these weights, to the target."""
    return jnp.square(_outputs(network, half, {**state, **weights}, x) - target).sum()


@functools.partial(jax.jit, static_argnames=("network", "half", "optimiser"), donate_argnames=("weights", "moments"))
def _step(
    network: Network,
    half: Half,
    optimiser: optax.GradientTransformation,
    state: State,
    weights: State,
    moments: optax.OptState,
    kept: Mapping[str, Array],
    x: Array,
    target: Array,
    scale: float,
) -> tuple[State, optax.OptState]:
    """Return the weights and AdamW's moments after a step on one batch; `scale` is 1 over a sequence's first error."""
    gradients = jax.grad(lambda weights: _squares(network, half, state, weights, x, target) * scale / len(x))(weights)
    gradients = {name: jnp.where(kept[name], gradient, 0) for name, gradient in gradients.items()}
    updates, moments = optimiser.update(gradients, moments, weights)
    return jax.tree.map(jnp.add, weights, updates), moments
