"""Weights in a range where products neither overflow nor vanish, and what they are divided by.

In float32 the eigenvalues of a weight whose entries are about 1e-25 vanish, and those of 1e20 overflow, though its
tail, its ranks and its KS distance are those of any multiple. So such a layer is divided by a power of two, which is
exact; any other stays as it is, to the bit. Its largest entry comes to lie at the upper end of the range, so that
beside one huge entry the others keep products that do not vanish.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_SAFE = 30  # exponents of two: squares of such entries, and sums of 1e8 of them, stay far within float32


def in_range(stack: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the matrices of a layer (K, R, C) divided by 2^exponent, and that exponent: 0, and a view, for most."""
    parts = (np.real(stack), np.imag(stack)) if np.iscomplexobj(stack) else (stack,)
    largest = float(max(max(part.max(), -part.min()) for part in parts))
    _, exponent = math.frexp(largest)
    if not math.isfinite(largest) or abs(exponent) <= _SAFE:
        return stack, 0
    exponent -= _SAFE
    return times_power(stack, -exponent), exponent


def in_range_traced(stack: Array) -> tuple[Array, Array]:
    """Return what `in_range` does of an array of JAX, traced or not; the exponent is int32, shape ()."""
    parts = (stack.real, stack.imag) if jnp.iscomplexobj(stack) else (stack,)
    largest = jnp.stack([jnp.abs(part).max() for part in parts]).max()
    info = jnp.finfo(largest.dtype)
    bits = lax.bitcast_convert_type(largest, f"int{info.bits}")
    exponent = (bits >> info.nmant) - info.maxexp + 2  # that of `frexp`, which XLA would compile to much more
    is_safe = (largest == 0) | ~jnp.isfinite(largest) | (jnp.abs(exponent) <= _SAFE)
    exponent = jnp.where(is_safe, 0, exponent - _SAFE).astype(jnp.int32)
    return times_power(stack, -exponent), exponent


def times_power(values: Any, exponent: Any) -> Any:
    """Return values, an array of NumPy or JAX, times 2^exponent, in their dtype; the exponent broadcasts to them."""
    # In two steps: 2^exponent itself may be beyond the dtype's range.
    half = exponent // 2
    if not isinstance(values, jax.Array) and not isinstance(exponent, jax.Array):
        one = np.ones((), values.real.dtype)
        return values * np.ldexp(one, half) * np.ldexp(one, exponent - half)
    dtype = values.real.dtype
    return values * _power(half, dtype) * _power(exponent - half, dtype)


def _power(exponent: Array, dtype: Any) -> Array:
    """Return 2^exponent, where it is a normal number of the dtype, by its bits: `ldexp` compiles to much more."""
    info = jnp.finfo(dtype)
    bits = (exponent.astype(f"int{info.bits}") + info.maxexp - 1) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)
