"""The forward pass block by block: the weights of a network are never in memory together.

One pass serves perplexity (nothing is looked at), the scores of OWL and DLP (every block's inputs are looked at) and
pruning (they are looked at, and the block is changed before its outputs are computed).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from .activations import Activations
from .calibration import Statistic, Statistics, input_statistics
from .models import Network, Part, State

TOKENS = 2048  # in one call: more is no faster on CPU

Tensors = dict[str, np.ndarray]
Read = Callable[[Part], Tensors]
Visit = Callable[[int, Tensors, Statistics], Tensors | None]


def embed(network: Network, read: Read, ids: np.ndarray, spill: Path | None = None) -> Activations:
    """Compute the inputs of the first block.

    Args:
        network: the model.
        read: returns the tensors of a part.
        ids: tokens (N, T), int32.
        spill: folder to hold the activations instead of memory.

    Returns:
        Activations (N, T, D).
    """
    state = network.to_state("embed", read("embed"))
    activations = Activations((*ids.shape, network.hidden_size), spill)
    for rows in batches(len(ids), ids.shape[1]):
        activations.write(rows, np.asarray(apply_embed(network, state, jnp.asarray(ids[rows], jnp.int32))))
    return activations


def run_blocks(
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
        read: returns the tensors of a block.
        activations: inputs of the first block; at the end, outputs of the last.
        title: title of the progress bar.
        visit: called with each block's number, tensors and statistics; may return other tensors, with which the
            block's outputs are then computed. Statistics are those of the block as it was read.
        statistic: statistic of `calibration.input_statistics` for `visit`; `None`: none.
        calibration: number of sequences, from the first on, that the statistics are of.
        first: blocks before this one are only passed through.
    """
    with tqdm(range(network.num_blocks), desc=title, unit="block") as bar:
        for block in bar:
            tensors = read(block)
            state = network.to_state(block, tensors)
            if visit is not None and block >= first:
                statistics = {}
                if statistic:
                    seen = (activations.read(rows) for rows in _bar(activations, calibration, f"{block}, statistics"))
                    statistics = input_statistics(network, block, state, seen, calibration, statistic)
                changed = visit(block, tensors, statistics)
                if changed is not None:
                    state = network.to_state(block, changed)
            for rows in _bar(activations, len(activations), str(block)):
                activations.write(rows, np.asarray(apply_block(network, state, activations.read(rows))))


def batches(count: int, length: int) -> Iterator[slice]:
    """Yield slices of sequences to compute at once, from 0 to `count`."""
    size = max(1, TOKENS // length)
    for at in range(0, count, size):
        yield slice(at, min(at + size, count))


def _bar(activations: Activations, count: int, title: str) -> Iterator[slice]:
    """Yield batches under a progress bar of sequences, shown only on a terminal."""
    with tqdm(total=count, desc=f"block {title}", unit="sample", leave=False, disable=None) as bar:
        for rows in batches(count, activations.shape[1]):
            yield rows
            bar.update(rows.stop - rows.start)


@functools.partial(jax.jit, static_argnames="network")
def apply_embed(network: Network, state: State, ids: Array) -> Array:
    """`Network.embed`, jitted."""
    return network.embed(state, ids)


@functools.partial(jax.jit, static_argnames="network")
def apply_block(network: Network, state: State, x: Array) -> Array:
    """`Network.block`, jitted."""
    return network.block(state, x)


def reader(read: Callable[[str], np.ndarray], network: Network) -> Read:
    """Make a reader of parts from a reader of tensors.

    Args:
        read: returns a tensor by its name in the checkpoint.
        network: knows the names of a part's tensors.

    Returns:
        A function from a part to its tensors by name.
    """
    return lambda part: {name: read(name) for name in network.tensors(part)}


def weights_of(network: Network, block: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights (out, in) of a block's linears by layer name, in the reference's order."""
    names = [network.layer_name(block, linear) for linear in network.linears]
    return {name: tensors[f"{name}.weight"] for name in names}
