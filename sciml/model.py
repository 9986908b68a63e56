"""DPOT: the next state of a field from its last states; an operator transformer with Fourier mixing, in Flax NNX.

>>> config = ModelConfig(image_size=16, patch_size=8, in_steps=2, width=16, depth=1, num_blocks=2, out_width=4)
>>> network = make_network(config)
>>> params = network.init(jax.random.key(0))
>>> fields, logits = network.apply(params, jnp.ones((3, 16, 16, 2, 4)))
>>> fields.shape, logits.shape, params["patch_embed"]["proj"]["kernel"].shape
((3, 16, 16, 1, 4), (3, 12), (1, 1, 35, 16))

References:
    Hao et al., DPOT: Auto-Regressive Denoising Operator Transformer for Large-Scale PDE Pre-Training,
    arXiv:2403.03542; `models/dpot.py` of thu-ml/DPOT at commit dcd2f9a9, whose numbers this model reproduces.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from farms_jax.errors import InputError
from farms_jax.programs.finite import Call, call

from .fourier import FourierFilter
from .modules import ACTIVATIONS, GROUPS, Dense, Draws, GroupNorm, Mlp, PatchKernel

Params = dict[str, Any]  # nested, with string keys; its leaves are arrays

TIME_AGGREGATIONS = ("mlp", "exp_mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a DPOT model; the defaults are those of DPOT-Tiny."""

    image_size: int = 128  # X and Y
    patch_size: int = 8  # side of a patch
    in_channels: int = 4  # C of the input
    out_channels: int = 4  # C of the output
    in_steps: int = 10  # T of the input
    out_steps: int = 1  # T of the output
    width: int = 512  # channels of the latent field
    depth: int = 4  # blocks
    num_blocks: int = 4  # diagonal blocks of the filters' weights
    modes: int = 32  # Fourier modes kept on each axis, at most
    mlp_ratio: float = 1.0  # hidden channels of a block's MLP, as a multiple of the width
    out_width: int = 32  # channels of the output layer
    num_classes: int = 12  # outputs of the class head: data sets of the pre-training
    normalize: bool = False  # take out each sample's mean and deviation, and give them back
    activation: str = "gelu"  # one of sciml.modules.ACTIVATIONS
    time_aggregation: str = "exp_mlp"  # or "mlp", without the cosines in time

    @property
    def patch_width(self) -> int:
        """Channels between the two convolutions of the patch embedding, as in the reference."""
        return self.out_channels * self.patch_size + 3

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    def check(self) -> None:
        """Raise an InputError for a shape that no model has."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in {int, "int"} and (not isinstance(value, int) or value < 1):
                raise InputError(f"{field.name}: must be an integer of at least 1, got {value!r}")
        for name, part in (("num_blocks", self.num_blocks), ("the groups of its norms", GROUPS)):
            if self.width % part:
                raise InputError(f"width: must be divisible by {name}, {part}; got {self.width}")
        if self.image_size % self.patch_size:
            raise InputError(f"image_size: must be divisible by patch_size {self.patch_size}, got {self.image_size}")
        if self.mlp_width < 1:
            raise InputError(f"mlp_ratio: must give the MLP at least one channel, got {self.mlp_ratio}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation: must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        if self.time_aggregation not in TIME_AGGREGATIONS:
            known = ", ".join(TIME_AGGREGATIONS)
            raise InputError(f"time_aggregation: must be one of {known}; got {self.time_aggregation!r}")
        if self.normalize and self.out_channels != self.in_channels:
            raise InputError(
                f"normalize: gives the output the input's scale, so out_channels ({self.out_channels}) must be "
                f"in_channels ({self.in_channels})"
            )


# As published: the table in the README of thu-ml/DPOT, where its configuration files disagree with it. Those have 8
# diagonal blocks for Large (with a question mark; 16 in the files for evaluation and fine-tuning) and an output width
# of 32 (128 in those): only 16 and 128 give the 509M parameters of the table. For Huge there is no file; the table's
# "8092" hidden channels are 4 * 2048, and with an output width of 128 that makes its 1.03B.
NAMED: dict[str, ModelConfig] = {
    "mini": ModelConfig(width=128, depth=4, num_blocks=4),  # ours: trains on two cores
    "tiny": ModelConfig(width=512, depth=4, num_blocks=4),
    "small": ModelConfig(width=1024, depth=6, num_blocks=8),
    "medium": ModelConfig(width=1024, depth=12, num_blocks=8, mlp_ratio=4.0),
    "large": ModelConfig(width=1536, depth=24, num_blocks=16, mlp_ratio=4.0, out_width=128),
    "huge": ModelConfig(width=2048, depth=27, num_blocks=8, mlp_ratio=4.0, out_width=128),
}


class PatchEmbed(nnx.Module):
    """Patches of all steps, with the coordinates x, y, t as further channels; `proj` is applied by the aggregation."""

    def __init__(self, config: ModelConfig, *, draws: Draws) -> None:
        """Ask for the parameters of a model's configuration."""
        size, inputs, hidden = config.patch_size, config.in_channels + 3, config.patch_width
        self.patches = PatchKernel(size, inputs, hidden, size * size * inputs, draws=draws)
        self.proj = Dense(hidden, config.width, convolution=True, draws=draws)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, fields: jax.Array) -> jax.Array:
        """Return (B, h, w, T, patch_width) for fields (B, X, Y, T, C).

        The coordinates never become channels: their share is the same for every sample, and a sum of a part of x, of y
        and of t alone.
        """
        batch, size_x, size_y, steps, channels = fields.shape
        kernel = self.patches.kernel[...]
        p, _, _, hidden = kernel.shape
        h, w = size_x // p, size_y // p
        patches = fields.reshape(batch, h, p, w, p, steps, channels).transpose(0, 1, 3, 5, 2, 4, 6)
        y = patches.reshape(-1, p * p * channels) @ kernel[:, :, :channels].reshape(-1, hidden)
        of_x, of_y, of_t = jnp.moveaxis(kernel[:, :, channels:], 2, 0)
        x_part = _grid(size_x).reshape(h, 1, 1, p) @ of_x.sum(1)
        y_part = _grid(size_y).reshape(w, 1, p) @ of_y.sum(0)
        t_part = _grid(steps)[:, None] * of_t.sum((0, 1))
        offset = x_part + y_part + t_part + self.patches.bias[...]
        return self.activation(y.reshape(batch, h, w, steps, hidden) + offset)


def _grid(size: int) -> np.ndarray:
    return np.linspace(0, 1, size).astype(np.float32)


class TimeAggregation(nnx.Module):
    """One latent field from those of T steps: sum over t of (field_t * cos(gamma t)) w_t, t from 0 to 1.

    With `mlp` in place of `exp_mlp` there are no cosines, and no gamma.
    """

    def __init__(self, config: ModelConfig, *, draws: Draws) -> None:
        """Ask for the parameters of a model's configuration."""
        steps, width = config.in_steps, config.width
        self.w = draws.normal((steps, width, width), 1 / (steps * math.sqrt(width)))
        if config.time_aggregation == "exp_mlp":
            self.gamma = nnx.Param(2.0 ** jnp.linspace(-10, 10, width))

    def __call__(self, patches: jax.Array, proj: Dense, pos: jax.Array) -> jax.Array:
        """Return (B, h, w, width): patches (B, h, w, T, P) projected by `proj`, plus positions `pos`, aggregated.

        All three are linear in the patches, and patches have few channels. So each step's projection and weights are
        multiplied first, and the latent fields of the single steps are never made: the same up to rounding, with a
        third less multiplications in the whole of DPOT-Tiny.
        """
        steps, width, _ = self.w.shape
        batch, h, w, _, channels = patches.shape
        weights, matrix = self.w[...], proj.matrix()
        if hasattr(self, "gamma"):
            waves = jnp.cos(_times(steps)[:, None] * self.gamma[...])
        else:
            waves = jnp.ones((steps, width))
        # One plain product per step, and the steps' sum in one product: faster on CPU than any with a batch axis.
        folded = jnp.concatenate([(matrix * waves[t]) @ weights[t] for t in range(steps)])
        summed = (waves[:, :, None] * weights).sum(0)
        y = patches.reshape(-1, steps * channels) @ folded
        constant = (proj.bias[...] + pos).reshape(h * w, width) @ summed
        return y.reshape(batch, h, w, width) + constant.reshape(h, w, width)


def _times(steps: int) -> np.ndarray:
    # gamma reaches 2^10, so that the last bit of t is seen: rounded as torch.linspace does, from both ends.
    index = np.arange(steps, dtype=np.float32)
    step = np.float32(1 / max(steps - 1, 1))
    return np.where(np.arange(steps) < steps // 2, step * index, 1 - step * index[::-1]).astype(np.float32)


class Block(nnx.Module):
    """x + mlp(norm2(filter(norm1(x)))); the filter itself adds its input, which is not x but norm1(x)."""

    def __init__(self, config: ModelConfig, *, draws: Draws) -> None:
        """Ask for the parameters of a model's configuration."""
        activation = ACTIVATIONS[config.activation]
        self.norm1 = GroupNorm(config.width)
        self.filter = FourierFilter(config.width, config.num_blocks, config.modes, activation, draws=draws)
        self.norm2 = GroupNorm(config.width)
        sizes = (config.width, config.mlp_width, config.width)
        self.mlp = Mlp(sizes, activation, convolution=True, draws=draws)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (B, h, w, width) for x (B, h, w, width)."""
        return x + self.mlp(self.norm2(self.filter(self.norm1(x))))


class OutLayer(nnx.Module):
    """From the latent field to patches of the output, and two 1 x 1 convolutions."""

    def __init__(self, config: ModelConfig, *, draws: Draws) -> None:
        """Ask for the parameters of a model's configuration."""
        size, width = config.patch_size, config.out_width
        # Torch takes the second axis of a transposed convolution's weight, its outputs, for the inputs.
        self.deconv = PatchKernel(size, config.width, width, size * size * width, draws=draws)
        self.conv1 = Dense(width, width, convolution=True, draws=draws)
        self.conv2 = Dense(width, config.out_steps * config.out_channels, convolution=True, draws=draws)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (B, X, Y, out_steps * out_channels) for x (B, h, w, width)."""
        batch, h, w, width = x.shape
        p, _, _, channels = self.deconv.kernel.shape
        kernel = self.deconv.kernel[...].transpose(2, 0, 1, 3).reshape(width, -1)
        y = (x.reshape(-1, width) @ kernel).reshape(-1, channels) + self.deconv.bias[...]
        # Pixels stay sorted by patch until only the few channels of the output have to be moved.
        y = self.conv2(self.activation(self.conv1(self.activation(y))))
        return y.reshape(batch, h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * p, w * p, -1)


class DPOT(nnx.Module):
    """The model: a field's next `out_steps` states, and the data set that it comes from."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draw the parameters as the reference does; raise an InputError for an impossible configuration."""
        config.check()
        self.config = config
        size, width, draws = config.image_size // config.patch_size, config.width, Draws()
        # The reference truncates it at +-2: a hundred deviations.
        self.pos_embed = draws.normal((size, size, width), 0.02)
        self.patch_embed = PatchEmbed(config, draws=draws)
        self.time_agg = TimeAggregation(config, draws=draws)
        self.blocks = nnx.List([Block(config, draws=draws) for _ in range(config.depth)])
        if config.normalize:
            self.scale_mu = Dense(2 * config.in_channels, width, draws=draws)
            self.scale_sigma = Dense(2 * config.in_channels, width, draws=draws)
        self.cls_head = Mlp((width, width, width, config.num_classes), ACTIVATIONS[config.activation], draws=draws)
        self.out_layer = OutLayer(config, draws=draws)
        draws.fill(rngs.params())

    def __call__(self, fields: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the next states (B, X, Y, out_steps, out_channels) and class logits (B, num_classes).

        Raises:
            InputError: fields are not (B, X, Y, in_steps, in_channels) as configured.
        """
        config = self.config
        size = config.image_size
        expected = (size, size, config.in_steps, config.in_channels)
        if fields.ndim != 5 or fields.shape[1:] != expected:
            wanted = ", ".join(map(str, expected))
            raise InputError(f"fields: the model expects (batch, X, Y, T, C) = (batch, {wanted}), got {fields.shape}")
        if not config.normalize:
            x = self.time_agg(self.patch_embed(fields), self.patch_embed.proj, self.pos_embed[...])
            return self._decode(x)
        mean, deviation = _statistics(fields)
        x = self.time_agg(self.patch_embed((fields - mean) / deviation), self.patch_embed.proj, self.pos_embed[...])
        both = jnp.concatenate([mean, deviation], axis=-1)[:, :, :, 0]
        y, logits = self._decode(self.scale_sigma(both) * x + self.scale_mu(both))
        return y * deviation + mean, logits

    def _decode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for block in self.blocks:
            x = block(x)
        y = self.out_layer(x)
        y = y.reshape(*y.shape[:3], self.config.out_steps, self.config.out_channels)
        return y, self.cls_head(x.mean((1, 2)))


def _statistics(fields: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and unbiased deviation + 1e-6 over X, Y, T, both (B, 1, 1, 1, C)."""
    axes = (1, 2, 3)
    mean = fields.mean(axes, keepdims=True)
    variance = jnp.square(fields - mean).sum(axes, keepdims=True) / (math.prod(fields.shape[1:4]) - 1)
    # The root has no finite gradient at 0, the variance of a constant channel.
    constant = variance == 0
    return mean, jnp.where(constant, 0, jnp.sqrt(jnp.where(constant, 1, variance))) + 1e-6


class Network(NamedTuple):
    """A model as pure functions of a nested dict of parameters with string keys."""

    init: Callable[[jax.Array], Params]  # from a key; compiled
    # (params, fields) as `DPOT.__call__`; its `call=` is for `farms_jax.programs.finite`
    apply: Callable[..., tuple[jax.Array, jax.Array]]


def make_network(config: ModelConfig) -> Network:
    """Return the pure functions of a model; an impossible configuration is an InputError."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: DPOT(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def init(key: jax.Array) -> Params:
        leaves = flatten_dict(nnx.to_pure_dict(nnx.state(DPOT(config, rngs=nnx.Rngs(params=key)))))
        # String keys, as checkpoints have them, also for the numbers of the blocks.
        return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in leaves.items()})

    def apply(params: Params, fields: jax.Array, *, call: Call = call) -> tuple[jax.Array, jax.Array]:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
        return call(nnx.merge(graph, state), fields)

    return Network(init, apply)
