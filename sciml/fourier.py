"""DPOT's mixing layer: low Fourier modes of the field, a small complex network on each, and back.

The transforms are products with small constant matrices that hold the kept modes alone. For the 16 x 16 latent
fields of the published models this is faster than an FFT, which would also have to move the channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .modules import Activation, Draws


class FourierFilter(nnx.Module):
    """Adaptive Fourier filter: y = x + irfft2(network(rfft2(x))), orthonormal transforms, modes beyond the kept ones 0.

    The network has two layers, complex and block-diagonal in the channels; biases and the activation act on the
    real and the imaginary part by themselves. As in the reference the kept modes of either axis are its first
    `modes` indices: on X, where negative frequencies follow the others, these are lost if `modes` is smaller than
    the axis; a larger `modes` keeps all there are.

    References:
        Hao et al., DPOT, arXiv:2403.03542, section 3.3; `AFNO2D` in `models/dpot.py` of thu-ml/DPOT.
    """

    def __init__(self, width: int, num_blocks: int, modes: int, activation: Activation, *, draws: Draws) -> None:
        """Ask for the parameters, uniform in [0, 1 / (width / num_blocks)^2) as in the reference."""
        size = width // num_blocks
        weights, biases, high = (2, num_blocks, size, size), (2, num_blocks, size), 1 / size**2
        self.w1 = draws.uniform(weights, 0, high)
        self.b1 = draws.uniform(biases, 0, high)
        self.w2 = draws.uniform(weights, 0, high)
        self.b2 = draws.uniform(biases, 0, high)
        self.modes = modes
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (B, X, Y, C) for x (B, X, Y, C)."""
        z = kept_modes(x, self.modes)
        z = self._layer(z, self.w1[...], self.b1[...], self.activation)
        z = self._layer(z, self.w2[...], self.b2[...], lambda z: z)
        return x + from_kept_modes(z, x.shape[1], x.shape[2])

    @staticmethod
    def _layer(z: jax.Array, w: jax.Array, b: jax.Array, activation: Activation) -> jax.Array:
        """Map (B, M, N, 2, C); each block as one real product, [re im] [[wr wi] [-wi wr]]."""
        _, blocks, size, _ = w.shape
        rows = z.reshape(-1, 2, blocks, size)
        real = jnp.concatenate([w[0], w[1]], axis=-1)
        imaginary = jnp.concatenate([-w[1], w[0]], axis=-1)
        matrices = jnp.concatenate([real, imaginary], axis=-2)
        # One plain product after another: XLA's products with a batch axis are slower on CPU.
        mapped = [
            activation(rows[:, :, i].reshape(-1, 2 * size) @ matrices[i] + b[:, i].reshape(-1)) for i in range(blocks)
        ]
        return jnp.stack([block.reshape(-1, 2, size) for block in mapped], axis=2).reshape(z.shape)


def kept_modes(x: jax.Array, modes: int) -> jax.Array:
    """Return the first modes of the orthonormal rfft2 of x (B, X, Y, C) over X and Y, at most `modes` on each axis.

    The shape is (B, M, N, 2, C) with M = min(modes, X), N = min(modes, Y // 2 + 1), and real and imaginary part on
    axis 3.
    """
    batch, size_x, size_y, channels = x.shape
    m, n = min(modes, size_x), min(modes, size_y // 2 + 1)
    to_x, to_y = _forward_matrices(size_x, size_y, m, n)
    z = _product(to_x, x.reshape(batch, size_x, size_y * channels))
    z = _product(to_y, z.reshape(batch * m, 2 * size_y, channels))
    return z.reshape(batch, m, n, 2, channels)


def from_kept_modes(z: jax.Array, size_x: int, size_y: int) -> jax.Array:
    """Return the orthonormal irfft2, (B, X, Y, C), of a spectrum z with the modes of `kept_modes` and 0 elsewhere.

    As in any irfft, on Y the imaginary parts of modes 0 and Y / 2 are ignored, after the transform of X.
    """
    batch, m, n, _, channels = z.shape
    from_x, from_y = _inverse_matrices(size_x, size_y, m, n)
    y = _product(from_y, z.reshape(batch * m, 2 * n, channels))
    y = _product(from_x, y.reshape(batch, 2 * m, size_y * channels))
    return y.reshape(batch, size_x, size_y, channels)


def _product(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    # Accelerators round the factors of a product to fewer bits by default; a transform should not.
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _angles(modes: int, size: int) -> np.ndarray:
    return 2 * np.pi * (np.outer(np.arange(modes), np.arange(size)) % size) / size


@functools.cache
def _forward_matrices(size_x: int, size_y: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return X (real) -> M modes with their two parts, (2 M, X); two parts of Y -> N modes with theirs, (2 N, 2 Y)."""
    x, y = _angles(m, size_x), _angles(n, size_y)
    to_x = np.stack([np.cos(x), -np.sin(x)], axis=1)  # M, part, X
    real = np.stack([np.cos(y), np.sin(y)], axis=1)  # N, part of the input, Y
    imaginary = np.stack([-np.sin(y), np.cos(y)], axis=1)
    to_y = np.stack([real, imaginary], axis=1)  # N, part, part of the input, Y
    return _scaled(to_x.reshape(2 * m, size_x), size_x), _scaled(to_y.reshape(2 * n, 2 * size_y), size_y)


@functools.cache
def _inverse_matrices(size_x: int, size_y: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two parts of M modes -> X, (X, 2 M); two parts of N modes -> two addends of Y, (2 Y, 2 N).

    With angles p of X and q of Y the field is the sum over modes of cos p (cos q re - sin q im) and of
    sin p (-cos q im - sin q re): the two addends, so that Y can go first.
    """
    x, y = _angles(m, size_x), _angles(n, size_y)
    # A mode of Y stands for its negative too, except 0 and Y / 2, whose sines are 0.
    alone = 2 * np.arange(n) % size_y == 0
    cos, sin = (np.where(alone, 1, 2)[:, None] * np.cos(y)).T, (np.where(alone, 0, 2)[:, None] * np.sin(y)).T
    from_x = np.stack([np.cos(x), np.sin(x)], axis=1)  # M, addend, X
    from_y = np.stack([np.stack([cos, -sin], axis=-1), np.stack([-sin, -cos], axis=-1)])  # addend, Y, N, part
    return _scaled(from_x.reshape(2 * m, size_x).T, size_x), _scaled(from_y.reshape(2 * size_y, 2 * n), size_y)


def _scaled(matrix: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(matrix / math.sqrt(size), np.float32)
