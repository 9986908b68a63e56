"""Statistics of the layers' inputs over the calibration sequences, for Wanda, SparseGPT, OWL and DLP."""

import functools
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .models import Network, State

_BANDS = 4  # of rows, in a symmetric product: 5/8 of its work; eight would save little more, 9/16

Statistic = Literal["squares", "hessian"]
Statistics = dict[str, Array]


def input_statistics(
    network: Network, block: int, state: State, batches: Iterable[np.ndarray], count: int, statistic: Statistic
) -> Statistics:
    """Return a statistic of the input of every linear of a block, by layer, in float32.

    `batches` hold the block's inputs, (B, T, D) each, `count` sequences in all. `"squares"` is the mean over sequences
    of the sum over tokens of x^2, (in,); `"hessian"` is 2 / sequences * sum of x x^T, (in, in). Linears that share an
    input share the array.
    """
    shapes = network.layer_shapes()
    sizes = [shapes[network.layer_name(block, group[0])][1] for group in network.input_groups]
    sums = [jnp.zeros((size,) if statistic == "squares" else (size, size), jnp.float32) for size in sizes]
    for x in batches:
        sums = _accumulate(network, statistic, state, x, sums)
    if statistic == "hessian":
        sums = [_symmetric(total) for total in sums]
    scale = (1 if statistic == "squares" else 2) / count
    return {
        network.layer_name(block, linear): total * scale
        for group, total in zip(network.input_groups, sums, strict=True)
        for linear in group
    }


# The sums are donated: Hessians are the largest arrays of a run, and two of each would have to fit.
@functools.partial(jax.jit, static_argnames=("network", "statistic"), donate_argnames="sums")
def _accumulate(network: Network, statistic: Statistic, state: State, x: Array, sums: list[Array]) -> list[Array]:
    all_inputs = network.inputs(state, x)
    inputs = [all_inputs[group[0]] for group in network.input_groups]
    if statistic == "squares":
        return [total + jnp.square(x).sum((0, 1)) for total, x in zip(sums, inputs, strict=True)]
    return [total + _upper_products(x) for total, x in zip(sums, inputs, strict=True)]


def _upper_products(x: Array) -> Array:
    """Return x^T x, right in the upper triangle alone: a band of its rows at a time."""
    x = x.reshape(-1, x.shape[-1])
    size = -(-x.shape[1] // _BANDS)
    starts = range(0, x.shape[1], size)
    bands = [jnp.matmul(x[:, at : at + size].T, x[:, at:], precision="highest") for at in starts]
    return jnp.concatenate([jnp.pad(band, ((0, 0), (at, 0))) for at, band in zip(starts, bands, strict=True)])


@jax.jit
def _symmetric(upper: Array) -> Array:
    return jnp.triu(upper) + jnp.triu(upper, 1).T
