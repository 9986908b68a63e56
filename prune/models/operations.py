"""Operations that the decoder families share, on the state of a part: its weights by name, linears as (in, out)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

State = dict[str, Array]

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


def rms_norm(state: State, name: str, x: Array, epsilon: float) -> Array:
    """Divide by the root mean square over the last axis, and scale."""
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    return x * (lax.rsqrt(mean_square + epsilon) * state[f"{name}.weight"])


def layer_norm(state: State, name: str, x: Array, epsilon: float) -> Array:
    """Take mean and variance over the last axis out; scale and shift where there are weights for it."""
    # Not the mean of squares less the square of the mean, which loses digits where one feature is far above the rest.
    centred = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    if f"{name}.weight" in state:
        return centred * (factor * state[f"{name}.weight"]) + state[f"{name}.bias"]
    return centred * factor
