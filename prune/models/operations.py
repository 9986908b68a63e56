"""Operations that the decoder families share, on the state of a part: its weights by name, linears as (in, out)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

State = dict[str, Array]

CHUNK = 128  # queries that meet their keys at once
CHUNKS = 16  # at most: each is compiled on its own

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def linear_shapes(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear's tensors by name, as in a checkpoint."""
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def embedding(state: State, name: str, ids: Array) -> Array:
    """Look up rows of a table: (..., D) for ids (...)."""
    return jnp.take(state[f"{name}.weight"], ids, axis=0)


def linear(state: State, name: str, x: Array) -> Array:
    """Apply a linear, with its bias where it has one: (..., out) for x (..., in)."""
    y = jnp.dot(x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms_norm(state: State, name: str, x: Array, epsilon: float, offset: float = 0.0) -> Array:
    """Divide by the root mean square over the last axis, and scale by the weight plus an offset."""
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    weight = state[f"{name}.weight"]
    return x * (lax.rsqrt(mean_square + epsilon) * (weight + offset if offset else weight))


def cap(x: Array, limit: float | None) -> Array:
    """Bend numbers to between plus and minus a limit; `None`: they stay."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def layer_norm(state: State, name: str, x: Array, epsilon: float) -> Array:
    """Take mean and variance over the last axis out; scale and shift where there are weights for it."""
    # Not the mean of squares less the square of the mean, which loses digits where one feature is far above the rest.
    centred = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    if f"{name}.weight" in state:
        return centred * (factor * state[f"{name}.weight"]) + state[f"{name}.bias"]
    return centred * factor


def attend(
    query: Array,
    key: Array,
    value: Array,
    window: Array | None = None,
    scale: float | Array | None = None,
    limit: float | None = None,
) -> Array:
    """Return causal attention, (B, T, K * G * H), heads side by side.

    Args:
        query: (B, T, K, G, H): G query heads for each of K key heads, with H features.
        key: (B, T, K, H).
        value: (B, T, K, H).
        window: number of positions that a query sees, its own included, a float scalar; `None` or infinity: all.
        scale: of the scores; `None`: 1 / sqrt(H).
        limit: see `cap`, of the scaled scores.
    """
    query = (query * (query.shape[-1] ** -0.5 if scale is None else scale)).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    windows = () if window is None else (window,)
    by_heads, in_chunks = (functools.partial(f, limit=limit) for f in (_attend_by_heads, _attend_in_chunks))
    mixed = lax.platform_dependent(query, key, value, *windows, cpu=by_heads, default=in_chunks)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape[0], query.shape[3], -1)


def _attend_by_heads(query, key, value, *window, limit=None):
    # Head after head, because XLA's products with a batch axis are two to four times slower on CPU than those without.
    heads = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (query, key, value))
    return lax.map(lambda head: _attend_in_chunks(*head, *window, limit=limit), heads).reshape(query.shape)


def _attend_in_chunks(query, key, value, window=None, *, limit=None):
    """Return (..., G, T, H) for a query of this shape and key and value (..., T, H).

    A chunk of queries meets the keys up to its last position only: half of the work for long sequences, and a small
    piece of the scores at a time.
    """
    length = query.shape[-2]
    size = max(CHUNK, -(-length // CHUNKS))
    chunks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        behind = jnp.arange(start, stop)[:, None] - jnp.arange(stop)
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        scores = cap(jnp.einsum("...gth,...sh->...gts", query[..., start:stop, :], key[..., :stop, :]), limit)
        scores = jnp.where(seen, scores, -jnp.inf)
        # Any shift gives the same weights, so that none has a gradient.
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        # Divided by their sum behind the product, where there are fewer numbers.
        mixed = jnp.einsum("...gts,...sh->...gth", weights, value[..., :stop, :])
        chunks.append(mixed / weights.sum(axis=-1, keepdims=True))
    return jnp.concatenate(chunks, axis=-2)
