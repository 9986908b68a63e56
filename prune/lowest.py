"""Selection of the lowest scores of a matrix, of each row, or of each group in a row.

Sorting is the slow part of pruning. The k-th smallest score is found here bit by bit instead: float32 numbers that are
not negative order like their bits, so 31 counts over the matrix give it exactly, whatever the number of elements.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def lowest(scores: Array, position: Array | int) -> Array:
    """Mark all scores up to the one at a position of the sorted list, as the reference does for whole matrices.

    Args:
        scores: any shape, float32, not negative.
        position: counted from 0; that score and its equals are marked too, so at least position + 1 of them.

    Returns:
        bool, the shape of `scores`.
    """
    bits = _bits(scores).reshape(1, -1)
    return (bits <= _kth(bits, jnp.asarray(position, jnp.int32))).reshape(scores.shape)


def lowest_of_rows(scores: Array, count: Array | int) -> Array:
    """Mark the `count` lowest scores of each row; of equal ones the first, as a stable sort does.

    Args:
        scores: (R, C) float32, not negative.
        count: to mark in each row, in [0, C].

    Returns:
        (R, C) bool.
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
    """Mark the `count` lowest scores of every group of consecutive ones in a row (N:M); of equal ones the first.

    Args:
        scores: (R, C) float32, C a multiple of `group`.
        count: N, to mark in each group, in [0, group].
        group: M.

    Returns:
        (R, C) bool.
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
    """Number at a position of each sorted row, (R, 1): the largest that at most `position` numbers lie below."""

    def settle(step: Array, found: Array) -> Array:
        trial = found | (jnp.int32(1) << (30 - step))
        below = (bits < trial).sum(1, keepdims=True, dtype=jnp.int32)
        return jnp.where(below <= position, trial, found)

    return jax.lax.fori_loop(0, 31, settle, jnp.zeros((bits.shape[0], 1), jnp.int32))
