"""Magnitude and Wanda: the score of every weight, and the mask that keeps the others.

Weights are (out, in) as in a checkpoint; masks are True where a weight is kept. Counts are rounded as in the public
code, each its own way: magnitude removes one weight more than asked, Wanda rounds down in each row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .lowest import lowest, lowest_of_groups, lowest_of_rows


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
        return _keep_of_groups(scores, *groups)
    return _keep_above(scores, int(weight.size * sparsity)) if sparsity > 0 else jnp.ones(weight.shape, bool)


def wanda(weight: Array, squares: Array, sparsity: float, groups: Groups | None = None) -> Array:
    """Return the mask (out, in) that keeps the weights of largest magnitude times the norm of their input, row by row.

    `squares` (in,) is the statistic of that name, see `prune.calibration`. int(in * sparsity) weights of each row are
    removed, of equal scores the first. `groups` take the place of the sparsity: N of every M inputs.

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, section 3.
    """
    scores = wanda_scores(weight, squares)
    if groups:
        return _keep_of_groups(scores, *groups)
    return _keep_of_rows(scores, int(weight.shape[1] * sparsity))


@jax.jit
def wanda_scores(weight: Array, squares: Array) -> Array:
    """Return Wanda's scores (out, in): magnitude of the weight times the norm of its input."""
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(squares)


def wanda_variant(weight: Array, squares: Array, sparsity: float) -> Array:
    """Return the mask (out, in) that removes in each row the lowest scores that make up one share of the row's sum.

    So rows differ in sparsity. The share is bisected in [0, 0.8] until the layer's sparsity is within 0.001 of the one
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


_keep_above = jax.jit(lambda scores, position: ~lowest(scores, position))
_keep_of_rows = jax.jit(lambda scores, count: ~lowest_of_rows(scores, count))
_keep_of_groups = jax.jit(
    lambda scores, removed, size: ~lowest_of_groups(scores, removed, size), static_argnames="size"
)
