"""Magnitude and Wanda: the score of every weight, and the mask that keeps the others.

Weights are (out, in) as in a checkpoint; masks are True where a weight is kept. Counts are rounded as in the public
code, each its own way: magnitude removes one weight more than asked, Wanda rounds down in each row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .lowest import lowest, lowest_of_groups, lowest_of_rows


class Groups(NamedTuple):
    """N:M sparsity: `removed` (N) of every `size` (M) consecutive inputs; not of the whole layer or row."""

    removed: int
    size: int


def magnitude(weight: Array, sparsity: float, groups: Groups | None = None) -> Array:
    """Keep the weights of largest magnitude.

    Args:
        weight: (out, in).
        sparsity: fraction of the layer to remove, in [0, 1); int(out * in * sparsity) + 1 weights are removed, and
            those equal to the last. None at a sparsity of 0. Without effect with `groups`.
        groups: remove by groups of consecutive inputs instead.

    Returns:
        Mask (out, in).

    References:
        `prune_magnitude` of the public FARMS and Wanda code.
    """
    scores = jnp.abs(weight.astype(jnp.float32))
    if groups:
        return _keep_of_groups(scores, groups.removed, groups.size)
    return _keep_above(scores, int(weight.size * sparsity)) if sparsity > 0 else jnp.ones(weight.shape, bool)


def wanda(weight: Array, squares: Array, sparsity: float, groups: Groups | None = None) -> Array:
    """Keep the weights of largest magnitude times the norm of their input, row by row.

    Args:
        weight: (out, in).
        squares: (in,) mean over the calibration sequences of the sum over tokens of the squared input.
        sparsity: fraction to remove, in [0, 1): int(in * sparsity) of each row, of equal scores the first. Without
            effect with `groups`.
        groups: remove by groups of consecutive inputs instead.

    Returns:
        Mask (out, in).

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, section 3.
    """
    scores = wanda_scores(weight, squares)
    if groups:
        return _keep_of_groups(scores, groups.removed, groups.size)
    return _keep_of_rows(scores, int(weight.shape[1] * sparsity))


@jax.jit
def wanda_scores(weight: Array, squares: Array) -> Array:
    """Return Wanda's scores (out, in): magnitude of the weight times the norm of its input."""
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(squares)


def wanda_variant(weight: Array, squares: Array, sparsity: float) -> Array:
    """Remove in each row the lowest scores that make up one share of the row's sum: rows differ in sparsity.

    The share is bisected in [0, 0.8] until the layer's sparsity is within 0.001 of the one asked for, as in the
    reference (its `use_variant`); a layer asked for more than that share can reach has less.

    Args:
        weight: (out, in).
        squares: (in,) as for `wanda`.
        sparsity: fraction of the layer to remove.

    Returns:
        Mask (out, in).
    """
    scores = wanda_scores(weight, squares)
    ordered = jnp.sort(scores, axis=1)
    sums = jnp.cumsum(ordered, axis=1)
    low, share, high = 0.0, 0.4, 0.8
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


_keep_above = jax.jit(lambda scores, position: ~lowest(scores, position))
_keep_of_rows = jax.jit(lambda scores, count: ~lowest_of_rows(scores, count))


@functools.partial(jax.jit, static_argnames="size")
def _keep_of_groups(scores: Array, removed: int, size: int) -> Array:
    return ~lowest_of_groups(scores, removed, size)
