"""Mappings of scores to learning-rate factors: those of TempBalance, and TB_Sigmoid.

Each takes scores (L,), float, one per layer, the larger the less trained, and returns factors (L,) around 1. `where`
marks the layers whose scores count; the others are given the mean score.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Mapping = Callable[..., Array]  # of (scores, low, high)


def linear(scores: Array, low: float, high: float, where: Array | bool = True) -> Array:
    """Map the smallest score to `low`, the largest to `high`, linearly in between (the reference's `tb_linear_map`)."""
    del where  # the mean score, which the other layers have, moves neither end
    span = scores.max() - scores.min()
    return low + (high - low) * (scores - scores.min()) / jnp.where(span > 0, span, 1)


def sqrt(scores: Array, low: float, high: float, where: Array | bool = True) -> Array:
    """Divide square roots by their mean (`tb_sqrt`); `low` and `high` are not used."""
    del low, high
    return _over_mean(jnp.sqrt(jnp.maximum(scores, 0)), where)


def log2(scores: Array, low: float, high: float, where: Array | bool = True) -> Array:
    """Divide logarithms by their mean (`tb_log2`); `low` and `high` are not used; a score of 1 gives 0."""
    del low, high
    return _over_mean(jnp.log2(jnp.maximum(scores, 1)), where)


def _over_mean(values: Array, where: Array | bool) -> Array:
    mean = values.mean(where=where)
    return jnp.where(mean > 0, values / jnp.where(mean > 0, mean, 1), 1)


def step(scores: Array, low: float, high: float, where: Array | bool = True) -> Array:
    """Map the rank r = 0..L-1 to `low + (high - low) r / L`, so that the top stays below `high` (`tb_step`)."""
    rank = jnp.argsort(jnp.argsort(jnp.where(where, scores, jnp.inf))).astype(scores.dtype)
    count = jnp.broadcast_to(jnp.asarray(where), scores.shape).sum(dtype=scores.dtype)
    return low + (high - low) * rank / jnp.maximum(count, 1)


def sigmoid(scores: Array, low: float, high: float, slope: float = 1.0, where: Array | bool = True) -> Array:
    """Return 10**f, with f a sigmoid, from log10(low) to log10(high), of the score less the mean (TB_Sigmoid).

    The reference's (sigmoid_min, sigmoid_max, exp_temp) are `low = 10**(-sigmoid_min / 2)`,
    `high = 10**(sigmoid_max / 2)` and `slope`: its (1, 1) is (0.316, 3.16) here. Another slope is passed as
    `mapping=functools.partial(farms_jax.mappings.sigmoid, slope=2.0)`.

    References:
        Liu et al., Model Balancing Helps Low-data Training and Fine-tuning, EMNLP 2024.
    """
    centred = scores - scores.mean(where=where)
    height = jnp.where(centred > 0, 2 * jnp.log10(high), -2 * jnp.log10(low))
    return 10 ** (height * (1 / (1 + jnp.exp(-slope * centred)) - 0.5))


NAMED: dict[str, Mapping] = {"linear": linear, "sqrt": sqrt, "log2": log2, "step": step, "sigmoid": sigmoid}
