"""The relative L2 error (L2RE), loss and measure of DPOT."""

import jax.numpy as jnp
from jax import Array

_FLOOR = 1e-8  # on the norm of the truth, as DPOT's criterion has it


def relative_l2(predicted: Array, true: Array) -> Array:
    """Return the L2RE of each sample, (B,): |predicted - true| / |true| by channel, then the mean over channels.

    The norms are over space and all T steps of fields (B, X, Y, T, C). As `SimpleLpLoss` of DPOT's code; Hao et al.,
    DPOT, ICML 2024, section 5.

    >>> import jax.numpy as jnp
    >>> true = jnp.ones((1, 4, 4, 2, 3))
    >>> relative_l2(true.at[..., 0].mul(1.3), true).round(3)
    Array([0.1], dtype=float32)
    """
    return (_norm(predicted - true) / (_norm(true) + _FLOOR)).mean(-1)


def relative_l2_by_step(predicted: Array, true: Array) -> Array:
    """Return the L2RE of each sample and step, (B, T); the norms are over space alone."""
    return (_norm(predicted - true, (1, 2)) / (_norm(true, (1, 2)) + _FLOOR)).mean(-1)


def _norm(fields: Array, axes: tuple[int, ...] = (1, 2, 3)) -> Array:
    # Zero has no gradient under the root; a prediction that is exact has an error of 0, and one that is NaN has NaN.
    squares = (fields**2).sum(axes)
    exact = squares == 0
    return jnp.where(exact, 0, jnp.sqrt(jnp.where(exact, 1, squares)))
