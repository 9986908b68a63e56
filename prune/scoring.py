"""Log-likelihoods of continuations: requests go through the network in padded batches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .forward import NotFiniteError, apply_block, apply_embed
from .models import Network, Part, State

_SHORTEST = 16  # shorter inputs are padded to it: fewer shapes to compile

Answer = tuple[float, bool]  # log-likelihood, and whether greedy decoding gives the continuation


class Request(NamedTuple):
    """Input of the network, all tokens of context and continuation but the last; and the continuation."""

    inputs: tuple[int, ...]
    continuation: Sequence[int]


class Batch(NamedTuple):
    """Inputs that go through the network together; every length is padded to a power of two.

    Padding stands behind the inputs, where a causal network does not see it.
    """

    ids: np.ndarray  # distinct inputs (B, T), int32
    rows: np.ndarray  # input of each request (R,), int32
    positions: np.ndarray  # where its continuation is predicted (R, C), int32
    targets: np.ndarray  # its continuation (R, C), int32
    scored: np.ndarray  # False where `targets` is padding (R, C)
    requests: list[int]  # numbers of the requests: R without padding


def make_batches(requests: Sequence[Request], max_length: int, tokens: int) -> Iterator[Batch]:
    """Yield batches of distinct inputs, longest first, so that too little memory shows at once.

    `tokens` is the most of a batch, padding included; `max_length` the longest batch, and no input is longer.
    """
    # Requests may share an input: answers of one token each, as in BoolQ, differ only in the target.
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request.inputs, []).append(number)
    waiting = sorted(numbers, key=lambda inputs: (-len(inputs), inputs))
    while waiting:
        length = min(max(_power(len(waiting[0])), _SHORTEST), max_length)
        most = max(1, tokens // length)
        fitting = [inputs for inputs in waiting[:most] if len(inputs) > length // 2 or length <= _SHORTEST]
        shape = (min(_power(len(fitting)), most), length)
        owners = [(row, number) for row, inputs in enumerate(fitting) for number in numbers[inputs]]
        yield _batch(requests, owners, shape)
        waiting = waiting[len(fitting) :]


def _power(number: int) -> int:
    """Return the number, rounded up to a power of two."""
    return 1 << (number - 1).bit_length()


def _batch(requests: Sequence[Request], owners: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Batch:
    """Put inputs into arrays, from (row, number of the request)."""
    ids = np.zeros(shape, np.int32)
    longest = max(len(requests[number].continuation) for _, number in owners)
    size = (_power(len(owners)), _power(longest))
    rows, positions, targets = np.zeros(size[0], np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
    scored = np.zeros(size, bool)
    for place, (row, number) in enumerate(owners):
        inputs, continuation = requests[number]
        end, count = len(inputs), len(continuation)
        ids[row, :end], rows[place] = inputs, row
        positions[place, :count] = np.arange(end - count, end)
        targets[place, :count], scored[place, :count] = continuation, True
    return Batch(ids, rows, positions, targets, scored, [number for _, number in owners])


def score(
    network: Network, state_of: Callable[[Part], State], batches: Sequence[Batch]
) -> Iterator[tuple[int, Answer]]:
    """Yield the number of each request, and its answer, with all batches in memory while blocks are read one by one.

    Raises:
        NotFiniteError: the network gives NaN or Inf.
    """
    state = state_of("embed")
    activations = [apply_embed(network, state, batch.ids) for batch in batches]
    for block in range(network.num_blocks):
        state = state_of(block)
        for number, x in enumerate(activations):  # in place: only one batch is held twice
            activations[number] = apply_block(network, state, x)
    state = state_of("head")
    for batch, x in zip(batches, activations, strict=True):
        logprobs, greedy = map(np.asarray, _score(network, state, x, *batch[1:-1]))
        totals = logprobs.astype(np.float64).sum(1)
        if not np.isfinite(totals).all():
            raise NotFiniteError("log-likelihoods of the tasks are not finite")
        for row, number in enumerate(batch.requests):
            yield number, (float(totals[row]), bool(greedy[row]))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    network: Network, state: State, x: Array, rows: Array, positions: Array, targets: Array, scored: Array
) -> tuple[Array, Array]:
    """Return log-probabilities of targets (R, C), 0 at padding, and whether all of a row are the likeliest (R,)."""
    # Only where something is predicted: logits of all positions would be the largest array by far.
    logits = network.head(state, x[rows[:, None], positions])
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.where(scored, logprobs, 0), jnp.all((logits.argmax(-1) == targets) | ~scored, 1)
