"""Random initial states of flows, drawn as PDEBench's two-dimensional ones are (Takamoto et al. 2022).

>>> import jax
>>> from sciml.initial import random_state
>>> random_state(jax.random.key(0), size=16, mach=0.1).shape
(16, 16, 4)

The distributions are those of its functions `init_multi_HD_2DRand` and `init_multi_HD_2DTurb`; the random numbers are
not, nor one detail: there the projection of "turb" is one frequency off, so that some divergence stays; here none does.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from .flow import GAMMA

InitialState = Literal["rand", "turb"]
HIGHEST = 4  # wave number along each axis, in periods of the square
_EDGE = 0.01  # width of a window's rim, in sides of the square


def random_state(key: Array, size: int, mach: float, kind: InitialState = "rand") -> Array:
    """Return a random initial state, shape (X, Y, 4): velocity along x and y, density, pressure; JAX's default float.

    Both kinds add up waves of random phase with wave numbers of 1 to 4 periods, either sign, along both axes.

    - "rand": velocity of mean modulus `mach` times the speed of sound; a density in [0.1, 10] and a temperature
      (pressure / density) in [0.1, 10], and waves in density and in pressure of mean modulus 1 to 20 %. In one state
      of two all this stands in a rectangle with soft rims, around which the gas is at rest and uniform. About one
      state in two thousand has a density or a pressure that is not positive.
    - "turb": velocity without divergence, of mean modulus 1; density 1; uniform pressure, after the Mach number.
    """
    wave_key, key = random.split(key)
    if kind == "turb":
        vx, vy = _waves(wave_key, size, 2, solenoidal=True)
        velocity = jnp.stack([vx, vy], -1) / jnp.mean(jnp.hypot(vx, vy))
        rest = jnp.broadcast_to(jnp.array([1, 1 / (GAMMA * mach**2)]), (size, size, 2))
        return jnp.concatenate([velocity, rest], -1)
    keys = random.split(key, 4)
    density, temperature = random.uniform(keys[0], (2,), minval=0.1, maxval=10)
    depth = random.uniform(keys[1], (2,), minval=0.01, maxval=0.2)
    vx, vy, *others = _waves(wave_key, size, 4)
    fast = mach * jnp.sqrt(GAMMA * temperature) / jnp.mean(jnp.hypot(vx, vy))
    waves = [1 + deep * wave / jnp.mean(jnp.abs(wave)) for deep, wave in zip(depth, others, strict=True)]
    pressure = density * temperature
    inside = jnp.stack([fast * vx, fast * vy, density * waves[0], pressure * waves[1]], -1)
    window = jnp.where(random.bernoulli(keys[2]), _window(keys[3], size), 1)[..., None]
    return window * inside + (1 - window) * jnp.stack([0 * density, 0 * density, density, pressure])


def centres(size: int) -> Array:
    """Return the coordinates of the cell centres along one axis of the unit square, shape (size,)."""
    return (jnp.arange(size) + 0.5) / size


def _waves(key: Array, size: int, count: int, *, solenoidal: bool = False) -> Array:
    """Return sums of waves with random phases, of amplitude 1 / sqrt(wave number) and any scale, shape (count, X, Y).

    With `solenoidal` the two fields are a velocity, of which only the part across each wave's direction is kept.
    """
    signed = [k for k in range(-HIGHEST, HIGHEST + 1) if k != 0]
    numbers = np.array([(i, j) for i in signed for j in signed])  # (K, 2)
    modulus = np.hypot(*numbers.T)
    angle = 2 * jnp.pi * centres(size)
    along_x, along_y = (jnp.outer(axis, angle) for axis in numbers.T)  # (K, X), (K, Y)
    phase = random.uniform(key, (count, len(numbers)), maxval=2 * jnp.pi)
    # sin(a + b) and cos(a + b) from those of a and b: products of matrices instead of a sine per wave and cell.
    sine, cosine = jnp.sin(phase) / np.sqrt(modulus), jnp.cos(phase) / np.sqrt(modulus)
    if solenoidal:
        across = np.stack([-numbers[:, 1], numbers[:, 0]]) / modulus  # unit vectors, (2, K)
        sine, cosine = (across * jnp.sum(across * part, 0) for part in (sine, cosine))
    s, c = jnp.sin, jnp.cos
    of_x = cosine[:, :, None] * s(along_x) + sine[:, :, None] * c(along_x)
    of_x_too = cosine[:, :, None] * c(along_x) - sine[:, :, None] * s(along_x)
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(of_x.mT, c(along_y), precision=highest) + jnp.matmul(of_x_too.mT, s(along_y), precision=highest)


def _window(key: Array, size: int) -> Array:
    """Return a random rectangle, 1 inside and 0 outside with a smooth rim, shape (X, Y)."""
    lower, upper = random.uniform(key, (2, 2))
    position = centres(size)[:, None]
    rise = jnp.tanh((position - 0.1 - 0.35 * lower) / _EDGE) - jnp.tanh((position - 0.55 - 0.35 * upper) / _EDGE)
    return jnp.outer(*rise.T) / 4
