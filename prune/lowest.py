"""Selection of the lowest scores of a matrix, of each row, or of each group in a row.

Sorting is the slow part of pruning. The k-th smallest score is found here bit by bit instead: float32 numbers that are
not negative order like their bits, so 31 counts over the matrix give it exactly, whatever the number of elements.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def lowest(scores: Array, position: Array | int) -> Array:
    """Return a mask of all scores up to the one at a position (from 0) of the sorted list, of any shape.

    Equals of that score are marked too, as in the reference, so at least position + 1. Scores must not be negative.
    """
    bits = _bits(scores).reshape(1, -1)
    return (bits <= _kth(bits, jnp.asarray(position, jnp.int32))).reshape(scores.shape)


def lowest_of_rows(scores: Array, count: Array | int) -> Array:
    """Return a mask of the `count` lowest scores, in [0, C], of each row of (R, C); of equal ones the first.

    That is the choice of a stable sort. Scores must not be negative.
    """
    count = jnp.asarray(count, jnp.int32)
    bits = _bits(scores)
    last = _kth(bits, count - 1)
    below, equal = bits < last, bits == last
    wanted = count - below.sum(1, keepdims=True, dtype=jnp.int32)
    has_ties = (equal.sum(1, keepdims=True, dtype=jnp.int32) > wanted).any()
    marked = lax.cond(
        has_ties,
        lambda: below | (equal & (jnp.cumsum(equal, 1, dtype=jnp.int32) <= wanted)),
        lambda: below | equal,
    )
    return marked & (count > 0)


def lowest_of_groups(scores: Array, count: Array | int, group: int) -> Array:
    """Return a mask of the `count` (N) lowest scores of every `group` (M) consecutive ones in a row of (R, C).

    Of equal ones the first. M divides C; scores must not be negative.
    """
    groups = _bits(scores).reshape(-1, group)
    mine, other = groups[:, :, None], groups[:, None, :]
    index = jnp.arange(group)
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return (before.sum(-1, dtype=jnp.int32) < count).reshape(scores.shape)


def _bits(scores: Array) -> Array:
    # abs: a score of -0.0 would have the sign bit.
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


def _kth(bits: Array, position: Array) -> Array:
    """Return the number at a position of each sorted row, (R, 1): the largest with at most `position` below it."""

    def settle(step: Array, found: Array) -> Array:
        # From the highest bit below the sign, which no score has.
        trial = found | (jnp.int32(1) << (30 - step))
        below = (bits < trial).sum(1, keepdims=True, dtype=jnp.int32)
        return jnp.where(below <= position, trial, found)

    return jax.lax.fori_loop(0, 31, settle, jnp.zeros((bits.shape[0], 1), jnp.int32))
