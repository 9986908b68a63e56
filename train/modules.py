"""Convolution, batch norm and linear layer with PyTorch's numerics, for images as (N, H, W, C).

Parameters are named `kernel`, `bias` and `scale`; kernels are (height, width, in, out) and (in, out).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from .cpu_gradients import EPSILON, batch_norm, conv2d

MOMENTUM = 0.1  # share of the new batch in the running statistics, torch.nn.BatchNorm2d's momentum


class Conv(nnx.Module):
    """Square convolution with torch's padding and initial values."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        bias: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw the parameters, float32; `dtype` is the type to compute in, by default theirs."""
        self.kernel = nnx.Param(uniform(rngs.params(), (size, size, inputs, outputs), size * size * inputs))
        self.bias = nnx.Param(uniform(rngs.params(), (outputs,), size * size * inputs)) if bias else None
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (N, H', W', outputs) for x (N, H, W, inputs)."""
        dtype = self.dtype or self.kernel.dtype
        y = conv2d(x.astype(dtype), self.kernel[...].astype(dtype), self.stride)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class Linear(nnx.Module):
    """Affine map with torch's initial values."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs) -> None:
        """Draw the parameters, float32; `dtype` is the type to compute in, by default theirs."""
        self.kernel = nnx.Param(uniform(rngs.params(), (inputs, outputs), inputs))
        self.bias = nnx.Param(uniform(rngs.params(), (outputs,), inputs))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (N, outputs) for x (N, inputs)."""
        dtype = self.dtype or self.kernel.dtype
        return x.astype(dtype) @ self.kernel[...].astype(dtype) + self.bias[...].astype(dtype)


class BatchNorm(nnx.Module):
    """Norm over (N, H, W) per channel, with torch's running statistics: the variance in them is the unbiased one."""

    def __init__(self, channels: int) -> None:
        """Start as the identity, with running statistics of mean 0 and variance 1, all of shape (channels,)."""
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.use_running_average = False  # the name that model.train() and model.eval() set

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (N, H, W, C), normalised in float32 and given back in x's dtype."""
        if self.use_running_average:
            factor = self.scale[...] * lax.rsqrt(self.var[...] + EPSILON)
            return (x * factor + (self.bias[...] - self.mean[...] * factor)).astype(x.dtype)
        y, mean, var = batch_norm(x, self.scale[...], self.bias[...])
        count = x.size // x.shape[-1]
        for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            running[...] = (1 - MOMENTUM) * running[...] + MOMENTUM * lax.stop_gradient(new)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Let `nnx.view` choose the statistics, as it does for Flax's own layer."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Draw from U(-b, b) with b = 1 / sqrt(fan_in): torch's default for weight and bias, of convolutions too."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
