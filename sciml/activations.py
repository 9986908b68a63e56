"""Activations by DPOT's names, with Torch's formulas."""

import math
from collections.abc import Callable

import jax

Activation = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution function of x, elementwise.

    By erf, as Torch has it: JAX's own exact form takes erfc, which needs twice the time on CPU and differs only where
    both are below 1e-7.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),  # the reference's slope, not Torch's default
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
}
