"""Perplexity as the pruning papers measure it: blocks of one text that do not overlap, each from its own start."""

import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .activations import Activations
from .checkpoints import Checkpoint
from .forward import batches, embed, reader, run_blocks
from .models import Network, State

_LOGITS = 2**24  # numbers alive at once


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        value: exp of the mean over blocks of a block's mean negative log-likelihood.
        nll: mean over the T - 1 predictions of each block, in nats.
        seconds: time of the evaluation.
    """

    value: float
    nll: list[float]
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
        title: title of the progress bar.

    Returns:
        The perplexity.
    """
    start = time.perf_counter()
    read = reader(checkpoint.read, network)
    activations = embed(network, read, ids, spill)
    run_blocks(network, read, activations, title=title)
    nll = losses(network, network.to_state("head", read("head")), activations, ids)
    return Perplexity(float(np.exp(nll.mean())), nll.tolist(), time.perf_counter() - start)


def losses(network: Network, head: State, activations: Activations, ids: np.ndarray) -> np.ndarray:
    """Return the mean loss of each of the last sequences, from the outputs of the last block.

    Args:
        network: the model.
        head: state of its head.
        activations: (M, T, D), M >= N.
        ids: tokens (N, T) of the last N sequences.

    Returns:
        (N,) float64, in nats.
    """
    first, found = len(activations) - len(ids), []
    for rows in batches(len(ids), ids.shape[1]):
        x = activations.read(slice(first + rows.start, first + rows.stop))
        found.append(np.asarray(_losses(network, head, x, jnp.asarray(ids[rows], jnp.int32)), np.float64))
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames="network")
def _losses(network: Network, head: State, x: Array, ids: Array) -> Array:
    """Logits are made for a few tokens at a time: those of a whole sequence can outweigh a block."""
    features, targets = x[:, :-1].reshape(-1, x.shape[-1]), ids[:, 1:].reshape(-1)

    def loss(token: tuple[Array, Array]) -> Array:
        logits = network.head(head, token[0][None, None])[0, 0]
        return jax.nn.logsumexp(logits) - logits[token[1]]

    at_once = max(1, _LOGITS // network.vocab_size)
    return lax.map(loss, (features, targets), batch_size=at_once).reshape(len(x), -1).mean(1)
