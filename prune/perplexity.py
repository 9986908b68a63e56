"""Perplexity as the pruning papers measure it: blocks of one text that do not overlap, each from its own start."""

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .checkpoints import Checkpoint
from .forward import Activations, NotFiniteError, Read, batches, embed, read_part, run_blocks
from .models import Network, State

_LOGITS = 2**24  # held in memory at once: 64 MiB


def tokens_at_once(network: Network) -> int:
    """Return for how many tokens logits are computed together."""
    return max(1, _LOGITS // network.vocab_size)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation."""

    value: float  # exp of the mean of `nll`
    nll: list[float]  # negative log-likelihood of each block in nats, the mean over its T - 1 predictions
    seconds: float


def perplexity(
    network: Network, checkpoint: Checkpoint, ids: np.ndarray, *, spill: Path | None = None, title: str = "perplexity"
) -> Perplexity:
    """Evaluate a model on blocks of text, (N, T) int32, with the weights of one decoder block in memory at a time.

    Returns:
        The perplexity, and what it is made of.

    Raises:
        NotFiniteError: the network's outputs, or the perplexity.
    """
    start = time.perf_counter()
    activations = embed(network, checkpoint.read, ids, spill)
    run_blocks(network, checkpoint.read, activations, title=title)
    nll = losses(network, checkpoint.read, activations, ids)
    return Perplexity(perplexity_of(nll, title), nll.tolist(), time.perf_counter() - start)


def perplexity_of(nll: np.ndarray, title: str) -> float:
    """Return exp of the mean of losses in nats, (N,) float64; a NotFiniteError where that is beyond float64."""
    mean = float(nll.mean())
    if not mean < math.log(sys.float_info.max):
        raise NotFiniteError(f"{title}: a mean loss of {mean:.4g} nats has no finite perplexity")
    return float(np.exp(mean))


def losses(network: Network, read: Read, activations: Activations, ids: np.ndarray) -> np.ndarray:
    """Return the mean loss in nats, (N,) float64, of the last N sequences, whose tokens are `ids` (N, T).

    `activations` (M, T, D), M >= N, are the outputs of the last block.

    Raises:
        NotFiniteError: a loss is not finite.
    """
    head, first, found = network.to_state("head", read_part(network, "head", read)), len(activations) - len(ids), []
    for rows in batches(len(ids), ids.shape[1], "losses"):
        x = activations.read(slice(first + rows.start, first + rows.stop))
        found.append(np.asarray(token_losses(network, head, x, jnp.asarray(ids[rows], jnp.int32)), np.float64))
    nll = np.concatenate(found)
    if bad := int((~np.isfinite(nll)).sum()):
        raise NotFiniteError(f"the losses of {bad} of {len(nll)} sequences are not finite")
    return nll


@functools.partial(jax.jit, static_argnames="network")
def token_losses(network: Network, head: State, x: Array, ids: Array) -> Array:
    """Return the mean loss of each sequence in nats, (N,), for the last block's outputs (N, T, D) and tokens (N, T)."""
    features, targets = x[:, :-1].reshape(-1, x.shape[-1]), ids[:, 1:].reshape(-1)

    @jax.checkpoint  # or the way back would keep all logits
    def loss(token: tuple[Array, Array]) -> Array:
        logits = network.head(head, token[0][None, None])[0, 0]
        return jax.nn.logsumexp(logits) - logits[token[1]]

    # A few tokens at a time: the logits of a whole sequence can outweigh a block.
    return lax.map(loss, (features, targets), batch_size=tokens_at_once(network)).reshape(len(x), -1).mean(1)
