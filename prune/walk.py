"""Block after block through a network whose weights are never in memory together.

One walk serves perplexity (nothing is looked at), the scores of OWL and DLP (every block's inputs are looked at) and
pruning (they are looked at, and the block is changed before its outputs are computed).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from .activations import Activations
from .models import Network, Part

TOKENS = 2048  # in one call: more is no faster on CPU
_BANDS = 4

Statistic = Literal["squares", "hessian"]
Tensors = dict[str, np.ndarray]
Read = Callable[[Part], Tensors]
Statistics = dict[str, Array]
Visit = Callable[[int, Tensors, Statistics], Tensors | None]


def embed(network: Network, read: Read, ids: np.ndarray, spill: Path | None = None) -> Activations:
    """Compute the inputs of the first block.

    Args:
        network: the model.
        read: gives the tensors of a part.
        ids: (N, T) int32 tokens.
        spill: folder to hold the activations instead of memory.

    Returns:
        Activations (N, T, D).
    """
    state = network.to_state("embed", read("embed"))
    activations = Activations((*ids.shape, network.hidden_size), spill)
    for rows in batches(0, len(ids), ids.shape[1]):
        activations.write(rows, np.asarray(apply_embed(network, state, jnp.asarray(ids[rows], jnp.int32))))
    return activations


def walk(
    network: Network,
    read: Read,
    activations: Activations,
    *,
    title: str,
    visit: Visit | None = None,
    statistic: Statistic | None = None,
    calibration: int = 0,
    first: int = 0,
) -> None:
    """Take activations through all blocks, in place.

    Args:
        network: the model.
        read: gives the tensors of a block.
        activations: inputs of the first block; at the end, outputs of the last.
        title: of the progress bar.
        visit: called with each block's number, tensors and statistics; may return other tensors, with which the
            block's outputs are then computed. Statistics are those of the block as it was read.
        statistic: what `visit` is given per layer: `"squares"`, the mean over sequences of the sum over tokens of
            x^2, (in,); `"hessian"`, 2 / sequences * sum of x x^T, (in, in). `None`: nothing.
        calibration: statistics are of so many sequences, the first.
        first: blocks before this one are only passed through.
    """
    length = activations.shape[1]
    with tqdm(range(network.num_blocks), desc=title, unit="block") as bar:
        for block in bar:
            tensors = read(block)
            state = network.to_state(block, tensors)
            if visit is not None and block >= first:
                statistics = {}
                if statistic:
                    statistics = _statistics(network, state, activations, statistic, calibration, block)
                changed = visit(block, tensors, statistics)
                if changed is not None:
                    state = network.to_state(block, changed)
            for rows in _bar(0, len(activations), length, f"block {block}"):
                activations.write(rows, np.asarray(apply_block(network, state, activations.read(rows))))


def batches(start: int, stop: int, length: int) -> Iterator[slice]:
    """Yield slices of sequences to compute at once."""
    size = max(1, TOKENS // length)
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _bar(start: int, stop: int, length: int, title: str) -> Iterator[slice]:
    """Batches under a progress bar of sequences; only where someone is looking."""
    with tqdm(total=stop - start, desc=title, unit="sample", leave=False, disable=None) as bar:
        for rows in batches(start, stop, length):
            yield rows
            bar.update(rows.stop - rows.start)


def _statistics(
    network: Network, state: nnx.State, activations: Activations, statistic: Statistic, count: int, block: int
) -> Statistics:
    shapes = network.tensors(block)
    sums = []
    for group in network.input_groups:
        size = shapes[f"{network.layer_name(block, group[0])}.weight"][1]
        sums.append(jnp.zeros((size,) if statistic == "squares" else (size, size), jnp.float32))
    for rows in _bar(0, count, activations.shape[1], f"block {block}, statistics"):
        sums = _accumulate(network, statistic, state, activations.read(rows), sums)
    scale = (1 if statistic == "squares" else 2) / count
    if statistic == "hessian":
        sums = [_symmetric(total) for total in sums]
    return {
        network.layer_name(block, linear): total * scale
        for group, total in zip(network.input_groups, sums, strict=True)
        for linear in group
    }


@functools.partial(jax.jit, static_argnames="network")
def apply_embed(network: Network, state: nnx.State, ids: Array) -> Array:
    """`Network.embed`, jitted."""
    return network.embed(state, ids)


@functools.partial(jax.jit, static_argnames="network")
def apply_block(network: Network, state: nnx.State, x: Array) -> Array:
    """`Network.block`, jitted."""
    return network.block(state, x)


@functools.partial(jax.jit, static_argnames=("network", "statistic"), donate_argnames="sums")
def _accumulate(network: Network, statistic: Statistic, state: nnx.State, x: Array, sums: list[Array]) -> list[Array]:
    inputs = network.inputs(state, x)
    of = _sum_of_squares if statistic == "squares" else _sum_of_products
    return [total + of(inputs[group[0]]) for group, total in zip(network.input_groups, sums, strict=True)]


def _sum_of_squares(x: Array) -> Array:
    return jnp.square(x).sum((0, 1))


def _sum_of_products(x: Array) -> Array:
    """Upper triangle of x^T x, and some of the lower: a symmetric product costs 5/8 in four bands of rows."""
    x = x.reshape(-1, x.shape[-1])
    size = -(-x.shape[1] // _BANDS)
    starts = range(0, x.shape[1], size)
    bands = [jnp.matmul(x[:, at : at + size].T, x[:, at:], precision="highest") for at in starts]
    return jnp.concatenate([jnp.pad(band, ((0, 0), (at, 0))) for at, band in zip(starts, bands, strict=True)])


@jax.jit
def _symmetric(upper: Array) -> Array:
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def reader(read: Callable[[str], np.ndarray], network: Network) -> Read:
    """Make a reader of parts from a reader of tensors.

    Args:
        read: gives a tensor by its name in the checkpoint.
        network: names the tensors of a part.

    Returns:
        A function from a part to its tensors by name.
    """
    return lambda part: {name: read(name) for name in network.tensors(part)}


def weights_of(network: Network, block: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights (out, in) of a block's linears by layer name, in the reference's order."""
    names = [network.layer_name(block, linear) for linear in network.linears]
    return {name: tensors[f"{name}.weight"] for name in names}
