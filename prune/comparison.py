"""How sure a perplexity is, and the difference of two: bootstrap over the blocks of text that both were measured on.

Losses of a block under two models rise and fall together, with how hard its text is. So a difference is far surer than
either perplexity, and it is resampled as a difference: paired.

>>> dense, pruned = [3.1, 2.0, 4.2], [3.4, 2.2, 4.6]
>>> change = compare(pruned, dense)
>>> f"{100 * change.value:+.1f} %, {100 * change.low:+.1f} to {100 * change.high:+.1f}"
'+35.0 %, +22.1 to +49.2'
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from farms_jax.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0  # the same losses give the same interval, in every run


class Interval(NamedTuple):
    """A number with the ends of its interval; both are the number itself where there is one block."""

    value: float
    low: float
    high: float


def perplexity_interval(nll: Sequence[float]) -> Interval:
    """Return a perplexity with its 95 % interval, from the mean loss of each block (N,) in nats."""
    return Interval(*(float(np.exp(loss)) for loss in _mean_interval(nll)))


def compare(nll: Sequence[float], other: Sequence[float]) -> Interval:
    """Return by which fraction a perplexity is above another (below: negative), with the 95 % interval of that.

    Args:
        nll: mean loss of each block (N,) in nats.
        other: the same of the model to compare with, on the same blocks.

    Returns:
        Fractions: 0.1 where the perplexity is 10 % above.

    Raises:
        InputError: there are not as many blocks of both.
    """
    if len(nll) != len(other):
        raise InputError(f"losses of {len(nll)} and {len(other)} blocks cannot be paired; evaluate on the same text")
    difference = np.asarray(nll, np.float64) - np.asarray(other, np.float64)
    return Interval(*(float(np.expm1(loss)) for loss in _mean_interval(difference)))


def _mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values (N,), and quantiles of the means of N of them drawn with replacement.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3: the percentile interval.
    """
    values, random = np.asarray(values, np.float64), np.random.default_rng(_SEED)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values.mean()), float(low), float(high)
