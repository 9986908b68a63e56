"""Magnitude and Wanda: the score of every weight, and the mask that keeps the others.

Weights are (out, in) as in a checkpoint; masks are True where a weight is kept. Counts are rounded as in the public
code, each its own way: magnitude removes one weight more than asked, Wanda rounds down in each row.

Sorting is the slow part of pruning. The k-th smallest score is found here bit by bit instead: float32 numbers that are
not negative order like their bits, so 31 counts over the matrix give it exactly, whatever the number of elements.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Groups(NamedTuple):
    """N:M sparsity: `removed` (N) of every `size` (M) consecutive inputs."""

    removed: int
    size: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return self.removed / self.size


def magnitude(weight: Array, sparsity: float, groups: Groups | None = None) -> Array:
    """Return the mask (out, in) that keeps the weights of largest magnitude.

    int(out * in * sparsity) + 1 weights are removed, and those equal to the last, as by `prune_magnitude` of the public
    FARMS and Wanda code; none at a sparsity of 0. `groups` take the place of the sparsity: N of every M inputs.
    """
    scores = jnp.abs(weight.astype(jnp.float32))
    if groups:
        return ~lowest_of_groups(scores, *groups)
    return ~lowest(scores, int(weight.size * sparsity)) if sparsity > 0 else jnp.ones(weight.shape, bool)


def wanda(weight: Array, squares: Array, sparsity: float, groups: Groups | None = None) -> Array:
    """Return the mask (out, in) that keeps the weights of largest magnitude times the norm of their input, row by row.

    `squares` (in,) is the statistic of that name, see `prune.forward`. int(in * sparsity) weights of each row are
    removed, of equal scores the first. `groups` take the place of the sparsity: N of every M inputs.

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, section 3.
    """
    scores = wanda_scores(weight, squares)
    if groups:
        return ~lowest_of_groups(scores, *groups)
    return ~lowest_of_rows(scores, int(weight.shape[1] * sparsity))


@jax.jit
def wanda_scores(weight: Array, squares: Array) -> Array:
    """Return Wanda's scores (out, in): magnitude of the weight times the norm of its input."""
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(squares)


def wanda_variant(weight: Array, squares: Array, sparsity: float) -> Array:
    """Return the mask (out, in) that removes in each row the lowest scores that make up one share of the row's sum.

    Rows differ in sparsity. The share is bisected in [0, 0.8] until the layer's sparsity is within 0.001 of the one
    asked for, as in the reference (its `use_variant`); a layer asked for more than that share can reach has less.
    """
    scores = wanda_scores(weight, squares)
    ordered = jnp.sort(scores, axis=1)
    sums = jnp.cumsum(ordered, axis=1)
    low, share, high = 0.0, 0.4, 0.8  # the reference's start and bounds
    while True:
        removed = _removed_of_share(scores, ordered, sums, share)
        reached = float(removed.mean(dtype=jnp.float32))
        if abs(reached - sparsity) <= 0.001 or high - low < 0.001:
            return ~removed
        if reached > sparsity:
            high = share
        else:
            low = share
        share = (low + high) / 2


@jax.jit
def _removed_of_share(scores: Array, ordered: Array, sums: Array, share: float) -> Array:
    within = (sums <= scores.sum(1, keepdims=True) * share).sum(1, keepdims=True)
    # Where not even the lowest is within the share, the index is -1: the whole row, as in the reference.
    return scores <= jnp.take_along_axis(ordered, within - 1, axis=1)


@jax.jit
def lowest(scores: Array, position: Array | int) -> Array:
    """Return a mask of all scores up to the one at a position (from 0) of the sorted list, of any shape.

    Equals of that score are marked too, as in the reference, so at least position + 1. Scores must not be negative.
    """
    bits = _bits(scores).reshape(1, -1)
    return (bits <= _kth(bits, jnp.asarray(position, jnp.int32))).reshape(scores.shape)


@jax.jit
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


@functools.partial(jax.jit, static_argnames="group")
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

    return lax.fori_loop(0, 31, settle, jnp.zeros((bits.shape[0], 1), jnp.int32))
