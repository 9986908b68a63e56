"""Factorising the Hessians of layers' inputs, as far damped as it takes."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

from farms_jax.errors import InputError

MOST_DAMPING = 10.0  # times the mean of the diagonal: beyond, the Hessian would no longer matter
_LEAF = 256  # triangles up to this size are inverted by LAPACK

Factors = TypeVar("Factors", bound=tuple[Array, ...])


def damped(attempt: Callable[[float], Factors], damping: float, layer: str) -> tuple[Factors, float]:
    """Return the factors of a layer's Hessian, and the damping that they needed.

    `attempt` factorises under a damping, relative to the mean of the diagonal, and gives NaN in the first factor where
    that fails. The damping is raised tenfold until it succeeds.

    Raises:
        InputError: no damping up to ten times the mean helps: the calibration holds NaN, Inf or nothing.
    """
    while damping <= MOST_DAMPING:
        factors = attempt(damping)
        if bool(jnp.isfinite(factors[0]).all()):
            return factors, damping
        damping *= 10
    raise InputError(
        f"{layer}: the Hessian of its inputs cannot be factorised, however damped; "
        "are there NaN or Inf in the weights, or is the calibration text too short? Give more --samples"
    )


def inverse_of_lower(lower: Array) -> Array:
    """Invert a lower triangular matrix by halves: products use all cores, LAPACK's solver would not."""
    size = len(lower)
    if size <= _LEAF:
        return lax.linalg.triangular_solve(lower, jnp.eye(size, dtype=lower.dtype), left_side=True, lower=True)
    half = size // 2
    first, last = inverse_of_lower(lower[:half, :half]), inverse_of_lower(lower[half:, half:])
    multiply = functools.partial(jnp.matmul, precision="highest")
    below = -multiply(last, multiply(lower[half:, :half], first))
    return jnp.block([[first, jnp.zeros((half, size - half), lower.dtype)], [below, last]])
