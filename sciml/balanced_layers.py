"""Which weights of DPOT are analysed as layers, and its Fourier weights as matrices.

The reference analyses every `Linear` and `Conv2d` of Torch. Two kinds of DPOT's weights are neither: the complex
block-diagonal weights of its Fourier filters, and the transposed convolution of its output. `--layers all` adds them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import DictKey

import farms_jax
from farms_jax import AxisRules, LayerReport, Tail, Window

from .config import TB, Config

NOT_IN_REFERENCE = (r"blocks/\d+/filter/w\d", r"out_layer/deconv/kernel")
AXES = AxisRules({r"blocks/\d+/filter/b\d": None, r"time_agg/.*": None})  # no matrices, whatever their rank
ENDS = ("patch_embed/patches/kernel", "out_layer/conv2/kernel")  # what layer selection leaves at the global rate
FOLLOW = {r"(blocks/\d+/filter)/b(\d)": r"\1/w\2"}  # a filter holds two layers: each bias goes with its weight


def measure(params: Any, config: Config, tb: TB) -> LayerReport:
    """Return the report on a network's layers: on whole matrices for "sigmoid", else on windows of one shape."""
    window = (
        None if tb == "sigmoid" else Window(aspect_ratio=config.aspect_ratio, min_division=1)
    )  # as in the reference
    exclude = NOT_IN_REFERENCE if config.layers == "reference" else ()
    view = spectral_view(params)
    return farms_jax.analyze(view, window=window, tail=Tail(config.tail, flat=None), exclude=exclude, axes=AXES)


def spectral_view(params: Any) -> Any:
    """Return the parameters with every Fourier weight as complex matrices.

    A filter's weight (2, blocks, in, out), real and imaginary part, becomes a complex kernel (1, blocks, in, out): each
    block is a matrix of its own, as each position of a convolution kernel is.
    """

    def as_matrices(path: tuple[Any, ...], leaf: Array) -> Array:
        is_fourier = DictKey("filter") in path and leaf.ndim == 4
        return jax.lax.complex(leaf[:1], leaf[1:]) if is_fourier else jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(as_matrices, params)
