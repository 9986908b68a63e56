"""The layers that DPOT is built of: channels last, convolutions as matrix products, Torch's initial values."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Activation = Callable[[jax.Array], jax.Array]
GROUPS = 8  # groups of channels in a norm, as in the reference
EPSILON = 1e-5  # torch.nn.GroupNorm's eps


def gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution function of x, elementwise.

    By erf, as Torch has it: JAX's own exact form takes erfc, which needs twice the time on CPU and differs only where
    both are below 1e-7.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# By DPOT's names, with Torch's formulas.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),  # the reference's slope, not Torch's default
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
}


class Draws:
    """Initial values of all of a model's parameters from a single random draw.

    A draw takes XLA a third of a second to compile on CPU; a model would need one for each parameter. So layers ask for
    their parameters here, and `fill` gives all of them their values.
    """

    def __init__(self) -> None:
        """Start without a parameter."""
        self._requests: list[tuple[nnx.Param, Callable[[jax.Array], jax.Array]]] = []

    def _ask(self, shape: tuple[int, ...], transform: Callable[[jax.Array], jax.Array]) -> nnx.Param:
        param = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
        self._requests.append((param, transform))
        return param

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> nnx.Param:
        """Return a parameter that will be uniform in [low, high)."""
        return self._ask(shape, lambda u: low + (high - low) * u)

    def torch_default(self, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
        """Return a weight or a bias as Torch draws both by default: uniform in +-1 / sqrt(fan_in)."""
        bound = 1 / math.sqrt(fan_in)
        return self.uniform(shape, -bound, bound)

    def normal(self, shape: tuple[int, ...], deviation: float) -> nnx.Param:
        """Return a parameter that will be normal with mean 0."""
        lowest = float(np.nextafter(np.float32(-1), np.float32(0)))  # -1 would become infinite
        return self._ask(shape, lambda u: deviation * math.sqrt(2) * jax.lax.erf_inv(jnp.maximum(2 * u - 1, lowest)))

    def fill(self, key: jax.Array) -> None:
        """Give every parameter its values."""
        sizes = [math.prod(param.shape) for param, _ in self._requests]
        numbers = jax.random.uniform(key, (sum(sizes),))
        start = 0
        for (param, transform), size in zip(self._requests, sizes, strict=True):
            param.set_value(transform(numbers[start : start + size]).reshape(param.shape))
            start += size


class Dense(nnx.Module):
    """Affine map of the last axis: a linear layer, or a convolution with a 1 x 1 kernel."""

    def __init__(self, inputs: int, outputs: int, *, convolution: bool = False, draws: Draws) -> None:
        """Ask for a kernel (inputs, outputs), or (1, 1, inputs, outputs) of a convolution, and a bias."""
        self.kernel = draws.torch_default((1, 1, inputs, outputs) if convolution else (inputs, outputs), inputs)
        self.bias = draws.torch_default((outputs,), inputs)

    def matrix(self) -> jax.Array:
        """Return the kernel as (inputs, outputs)."""
        return self.kernel[...].reshape(self.kernel.shape[-2:])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (..., outputs) for x (..., inputs)."""
        # As a product of two matrices: one with batch axes is slower on CPU.
        y = x.reshape(-1, x.shape[-1]) @ self.matrix() + self.bias[...]
        return y.reshape(*x.shape[:-1], -1)


class PatchKernel(nnx.Module):
    """Kernel (P, P, inputs, outputs) and bias of a convolution whose stride is its size P, or of its transpose."""

    def __init__(self, size: int, inputs: int, outputs: int, fan_in: int, *, draws: Draws) -> None:
        """Ask for kernel and bias, within +-1 / sqrt(fan_in)."""
        self.kernel = draws.torch_default((size, size, inputs, outputs), fan_in)
        self.bias = draws.torch_default((outputs,), fan_in)


class GroupNorm(nnx.Module):
    """Norm over X, Y and the channels of a group, per sample."""

    def __init__(self, width: int) -> None:
        """Start with scale 1 and bias 0, both (width,)."""
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (B, X, Y, width) for x (B, X, Y, width)."""
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        mean = _group_means(rows.mean(1))
        factor = self.scale[...] * jax.lax.rsqrt(_group_means(jnp.square(rows - mean).mean(1)) + EPSILON)
        return (rows * factor + (self.bias[...] - mean * factor)).reshape(x.shape)


def _group_means(x: jax.Array) -> jax.Array:
    # (B, C) to (B, 1, C): each channel gets its group's mean. The sums over X and Y, one per channel, come first, as
    # those are sums that XLA vectorises on CPU.
    batch, channels = x.shape
    means = x.reshape(batch, GROUPS, -1).mean(-1)
    return jnp.repeat(means, channels // GROUPS, axis=-1, total_repeat_length=channels)[:, None]


class Mlp(nnx.Module):
    """Dense layers `fc1`, `fc2`, ... with activations between them."""

    def __init__(
        self, sizes: tuple[int, ...], activation: Activation, *, convolution: bool = False, draws: Draws
    ) -> None:
        """Ask for the parameters; `sizes` are the channels of the input and of every layer."""
        self.depth = len(sizes) - 1
        self.activation = activation
        for i in range(self.depth):
            setattr(self, f"fc{i + 1}", Dense(sizes[i], sizes[i + 1], convolution=convolution, draws=draws))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (..., last size) for x (..., first size)."""
        for i in range(self.depth):
            x = getattr(self, f"fc{i + 1}")(x if i == 0 else self.activation(x))
        return x
