"""Perplexity as the pruning papers measure it: blocks of one text that do not overlap, each from its own start."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from .activations import Activations
from .checkpoints import Checkpoint
from .models import Network
from .walk import batches, embed, reader, walk

_LOGITS = 2**24  # numbers alive at once


class Perplexity(NamedTuple):
    """Result of an evaluation.

    Attributes:
        value: exp of the mean over blocks of a block's mean negative log-likelihood.
        nll: (N,) float64, the mean over the T - 1 predictions of each block, in nats.
        seconds: it took.
    """

    value: float
    nll: np.ndarray
    seconds: float


def perplexity(
    network: Network, checkpoint: Checkpoint, ids: np.ndarray, *, spill: Path | None = None, title: str = "perplexity"
) -> Perplexity:
    """Evaluate a model, one block of weights in memory at a time.

    Args:
        network: the model.
        checkpoint: its weights.
        ids: (N, T) int32, blocks of the text.
        spill: folder to hold activations instead of memory.
        title: of the progress bar.

    Returns:
        The perplexity.
    """
    start = time.perf_counter()
    read = reader(checkpoint.read, network)
    activations = embed(network, read, ids, spill)
    walk(network, read, activations, title=title)
    nll = losses(network, network.to_state("head", read("head")), activations, ids)
    return Perplexity(float(np.exp(nll.mean())), nll, time.perf_counter() - start)


def losses(network: Network, head: nnx.State, activations: Activations, ids: np.ndarray, first: int = 0) -> np.ndarray:
    """Mean loss of each sequence, from the outputs of the last block.

    Args:
        network: the model.
        head: state of its head.
        activations: (first + N, T, D).
        ids: (N, T) tokens of the sequences from `first` on.
        first: sequence where they begin.

    Returns:
        (N,) float64, in nats.
    """
    found = []
    for rows in batches(0, len(ids), ids.shape[1]):
        x = activations.read(slice(first + rows.start, first + rows.stop))
        found.append(np.asarray(_losses(network, head, x, jnp.asarray(ids[rows], jnp.int32)), np.float64))
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames="network")
def _losses(network: Network, head: nnx.State, x: Array, ids: Array) -> Array:
    """Logits are made for a few tokens at a time: those of a whole sequence can outweigh a block."""
    features, targets = x[:, :-1].reshape(-1, x.shape[-1]), ids[:, 1:].reshape(-1)

    def loss(token: tuple[Array, Array]) -> Array:
        logits = network.head(head, token[0][None, None])[0, 0]
        return jax.nn.logsumexp(logits) - logits[token[1]]

    at_once = max(1, _LOGITS // network.vocab_size)
    return lax.map(loss, (features, targets), batch_size=at_once).reshape(len(x), -1).mean(1)
