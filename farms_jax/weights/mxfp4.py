"""MXFP4, the four-bit floats in which gpt-oss stores its experts: 32 weights to a block, with a scale of their own.

A weight `NAME` is two tensors of bytes: `NAME_blocks` with two weights in a byte, the first in its lower half, shape
(..., blocks, 16), and `NAME_scales` with the exponents of the blocks, shape (..., blocks).

>>> import numpy as np
>>> dequantize(np.full((1, 16), 0x72, np.uint8), np.array([128], np.uint8))[:4]
array([ 2., 12.,  2., 12.], dtype=float32)
"""

from collections.abc import Mapping

import numpy as np

from farms_jax.weights.reading import TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # sign, 2, 1 bits
_BIAS = 127  # of the exponent
_BYTES = np.dtype(np.uint8)


def unpacked(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the float32 weights that pairs of tensors stand for, by name."""
    found = {}
    for name in (name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)):
        scales = tensors.get(name + SCALES)
        if name in tensors or scales is None or not scales.shape:
            continue
        pair = TensorInfo(_BYTES, (*scales.shape, 16)), TensorInfo(_BYTES, scales.shape)
        if (tensors[name + BLOCKS], scales) == pair:
            *shape, count = scales.shape
            found[name] = TensorInfo(np.dtype(np.float32), (*shape, 32 * count))
    return found


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the weights, float32 (..., 32 * blocks), of blocks (..., blocks, 16) and scales (..., blocks), uint8."""
    halves = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], axis=-1)
    weights = np.ldexp(halves.reshape(*scales.shape, 32), scales[..., None].astype(np.int32) - _BIAS)
    return weights.reshape(*scales.shape[:-1], -1)
