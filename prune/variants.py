"""Many models that differ in the levels of their layers, taken through the network together, and how far each is off.

One block is in memory at a time, and variants that are the same up to a block share all that is computed up to there.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from .forward import Activations, apply_block, batches, embed, read_part
from .job import Job
from .levels import Choice, Levels
from .models import Network, State
from .perplexity import tokens_at_once

Variant = Sequence[Choice]  # of every block


def variant_of(network: Network, levels: Mapping[str, int]) -> Variant:
    """Return the variant that has these layers at their levels, and all others dense."""
    return [
        tuple(levels.get(network.layer_name(block, linear)) for linear in network.linears)
        for block in range(network.num_blocks)
    ]


def run_variants(
    job: Job, levels: Levels, variants: Sequence[Variant], ids: np.ndarray, title: str
) -> list[Activations]:
    """Return the outputs of the last block for tokens (N, T), for each variant; equal variants have the same object."""
    network, read, spill = job.network, job.checkpoint.read, job.config.spill
    at = [embed(network, read, ids, spill)] * len(variants)
    for block in tqdm(range(network.num_blocks), desc=title, unit="block", leave=False):
        dense = read_part(network, block, read)
        wanted: dict[Choice, list[Activations]] = {}
        for inputs, variant in zip(at, variants, strict=True):
            of_choice = wanted.setdefault(tuple(variant[block]), [])
            if inputs not in of_choice:
                of_choice.append(inputs)
        left = Counter(inputs for of_choice in wanted.values() for inputs in of_choice)
        outputs: dict[tuple[Activations, Choice], Activations] = {}
        for choice, of_choice in wanted.items():
            state = network.to_state(block, levels.apply(block, dense, choice))
            for inputs in of_choice:
                left[inputs] -= 1
                # In place, unless another variant goes on from here.
                target = Activations(inputs.shape, spill) if left[inputs] else inputs
                for rows in batches(len(inputs), ids.shape[1], f"block {block}"):
                    target.write(rows, np.asarray(apply_block(network, state, inputs.read(rows))))
                outputs[inputs, choice] = target
        at = [outputs[inputs, tuple(variant[block])] for inputs, variant in zip(at, variants, strict=True)]
    return at


def divergences(
    job: Job, dense: Activations, variants: Sequence[Activations], sequences: Sequence[int] | None = None
) -> np.ndarray:
    """Return the mean divergence from the dense model over tokens, in nats, (V, N) float64.

    It is KL(dense || variant) of the distributions of the next token. `variants` are outputs of the last block
    (N, T, D) for the `sequences` of `dense`, its first N where none are named. Logits are computed for a few tokens at
    a time.
    """
    network, head = job.network, job.network.to_state("head", read_part(job.network, "head", job.checkpoint.read))
    count, length = len(variants[0]), dense.shape[1]
    found, at_once = np.zeros((len(variants), count)), tokens_at_once(network)
    for row, sequence in enumerate(range(count) if sequences is None else sequences):
        for start in range(0, length, at_once):
            tokens = slice(start, start + at_once)
            expected = _log_probabilities(network, head, dense.read(slice(sequence, sequence + 1))[0, tokens])
            for number, variant in enumerate(variants):
                features = variant.read(slice(row, row + 1))[0, tokens]
                found[number, row] += float(_divergence(network, head, expected, features))
    return found / length


@functools.partial(jax.jit, static_argnames="network")
def _log_probabilities(network: Network, head: State, features: Array) -> Array:
    """Return log-probabilities (T, V) for features (T, D)."""
    return jax.nn.log_softmax(network.head(head, features[None])[0])


@functools.partial(jax.jit, static_argnames="network")
def _divergence(network: Network, head: State, expected: Array, features: Array) -> Array:
    """Return the sum over tokens of the divergence from log-probabilities (T, V) of features (T, D)."""
    return (jnp.exp(expected) * (expected - _log_probabilities(network, head, features))).sum()
