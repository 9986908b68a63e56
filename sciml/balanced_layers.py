"""Which weights of DPOT are layers to analyse, and how its Fourier weights become matrices.

The reference analyses what is a `Linear` or a `Conv2d` in Torch. Two kinds of weight of DPOT are neither: the complex
block-diagonal weights of its Fourier filters, and the transposed convolution of its output. `analyse="all"` adds them.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import DictKey

import farms_jax
from farms_jax import LayerReport, Tail, Window

Analyse = Literal["reference", "all"]
NOT_IN_REFERENCE = (r"blocks/\d+/filter/w\d", r"out_layer/deconv/kernel")
ENDS = ("patch_embed/patches/kernel", "out_layer/conv2/kernel")  # what layer selection leaves at the global rate
FOLLOW = {r"(blocks/\d+/filter)/b(\d)": r"\1/w\2"}  # a filter holds two layers: each bias goes with its weight


def measure(params: Any, *, analyse: Analyse, window: Window | None, tail: Tail) -> LayerReport:
    """Analyse the layers of a DPOT network.

    Args:
        params: parameters of a DPOT network.
        analyse: "reference" for linear layers and convolutions, "all" for Fourier weights and the transposed
            convolution too.
        window: FARMS windows, or `None` for whole matrices.
        tail: rule for the tail.

    Returns:
        The report; names are those of `params`.

    Raises:
        ValueError: a weight has NaN or Inf.
    """
    exclude = NOT_IN_REFERENCE if analyse == "reference" else ()
    return farms_jax.analyze(spectral_view(params), window=window, tail=tail, exclude=exclude)


def spectral_view(params: Any) -> Any:
    """Show every Fourier weight as complex matrices.

    A filter's weight (2, blocks, in, out), real and imaginary part, becomes a complex kernel (1, blocks, in, out):
    each block is a matrix of its own, as each position of a convolution kernel is.

    Args:
        params: parameters of a DPOT network.

    Returns:
        A tree of the same names.
    """
    return jax.tree_util.tree_map_with_path(_as_matrices, params)


def _as_matrices(path: tuple[Any, ...], leaf: Array) -> Array:
    is_fourier = DictKey("filter") in path and leaf.ndim == 4
    return jax.lax.complex(leaf[:1], leaf[1:]) if is_fourier else jnp.asarray(leaf)
