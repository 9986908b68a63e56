"""Numbers of less than a byte, and scales of blocks of them, as quantised weights are stored.

>>> import numpy as np
>>> unpacked(np.array([0x76543210], np.uint32), 4)
array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
>>> fp4(np.array([0x72], np.uint8))
array([1., 6.], dtype=float32)
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # sign, 2, 1 bits
_BIAS = 127  # of an exponent that is a scale (E8M0)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned numbers of so many bits, 1 to 8, that rows of integers hold, the lowest bits first.

    Args:
        words: integers (..., n), little-endian; numbers may go over from one to the next.
        bits: bits of a number.

    Returns:
        uint8 (..., n * bits of an integer // bits).
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        numbers = octets[..., None] >> shifts & np.uint8(2**bits - 1)
        return numbers.reshape(*octets.shape[:-1], -1)
    count = octets.shape[-1] * 8 // bits
    flags = np.unpackbits(octets, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(flags.reshape(*flags.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def fp4(octets: np.ndarray) -> np.ndarray:
    """Return the four-bit floats E2M1 of bytes (..., n), the first in the lower half: float32 (..., 2 n)."""
    return _FP4[unpacked(octets, 4)]


def powers_of_two(octets: np.ndarray) -> np.ndarray:
    """Return the scales, float32, of which the exponents alone are stored (E8M0), as uint8 or as such floats."""
    return np.ldexp(np.float32(1), octets.view(np.uint8).astype(np.int32) - _BIAS)


def float8(octets: np.ndarray) -> np.ndarray:
    """Return eight-bit floats E4M3 that are stored as uint8, or as such floats: float32."""
    return octets.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def in_groups(numbers: np.ndarray, scales: np.ndarray, offsets: np.ndarray | float = 0.0) -> np.ndarray:
    """Return numbers (..., n) times scales (..., groups) plus offsets, each of n / groups in a row: float32."""
    grouped = numbers.reshape(*scales.shape, -1).astype(np.float32) * scales[..., None].astype(np.float32)
    if isinstance(offsets, np.ndarray):
        grouped += offsets[..., None].astype(np.float32)
    return grouped.reshape(numbers.shape)


def block_sizes(
    shape: Sequence[int], scales: Sequence[int], declared: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Return how many entries of a weight share a scale along each axis; `None` where the shapes do not tell.

    Args:
        shape: of the weight.
        scales: of its scales: one for all, or one for each block along each axis; later axes may be left out, which
            have one.
        declared: block sizes that are written somewhere, of the last axes.

    >>> block_sizes((200, 300), (2, 3), (128, 128)), block_sizes((4, 6), (4, 1)), block_sizes((4, 6), ())
    ((128, 128), (1, 6), (4, 6))
    """
    padded = (*scales, *(1 for _ in shape[len(scales) :]))
    if np.prod(padded) == 1:
        return tuple(shape)
    if len(padded) > len(shape):
        return None
    hints = [0] * len(shape) if declared is None else [0, *[0] * len(shape), *declared][-len(shape) :]
    sizes = []
    for length, count, hint in zip(shape, padded, hints, strict=True):
        fitting = [size for size in (hint, 128) if size and count == -(-length // size)]
        if count == 1 or (count and length % count == 0 and not fitting):
            fitting = [length // count]
        if not fitting:
            return None
        sizes.append(fitting[0])
    return tuple(sizes)


def in_blocks(numbers: np.ndarray, scales: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return numbers times scales of blocks of these sizes; later axes may be missing in the scales: float32."""
    spread = scales.astype(np.float32)
    if spread.size == 1:
        return numbers.astype(np.float32) * spread.reshape(())
    spread = spread.reshape(*spread.shape, *(1 for _ in range(numbers.ndim - spread.ndim)))
    for axis, size in enumerate(sizes[-numbers.ndim :]):
        if 1 < spread.shape[axis] < numbers.shape[axis]:
            spread = np.repeat(spread, size, axis=axis)[(slice(None),) * axis + (slice(numbers.shape[axis]),)]
    return numbers.astype(np.float32) * spread
