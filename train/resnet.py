"""ResNet-18, 34 and 50 for small images: a 3 x 3 stem without pooling, four stages, global average.

Names read as in torch: `conv1/kernel`, `layer2/0/shortcut/1/scale`, `linear/kernel`.

References:
    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385.
"""

import jax
from flax import nnx
from jax.typing import DTypeLike

from .modules import BatchNorm, Conv, Linear

# Regexes on parameter names, for re.fullmatch. EXCLUDE: the first and the last layer, which the papers' layer
# selection leaves unscaled. FOLLOW: from a norm's parameter to the kernel it follows by name, which leaves the
# norms of the shortcuts alone. FOLLOW_ORDER: by position after the convolution, which covers those too.
EXCLUDE = (r"conv1/kernel", r"linear/kernel")
FOLLOW = {r"(.*)bn(\d+)/.*": r"\1conv\2/kernel"}
FOLLOW_ORDER = FOLLOW | {r"(.*shortcut)/1/.*": r"\1/0/kernel"}

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # blocks per stage, Table 1 of He et al.


class ResNet(nnx.Module):
    """Residual network; `model.train()` and `model.eval()` choose the statistics of the norms."""

    def __init__(
        self, depth: int, num_classes: int, width: float = 1.0, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        """Draw the parameters; `width` is a factor on all channels, `dtype` the type to compute in."""
        block = _Bottleneck if depth >= 50 else _BasicBlock
        base = round(64 * width)
        self.conv1 = Conv(3, base, 3, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(base)
        inputs = base
        for stage, blocks in enumerate(STAGES[depth]):
            layer = nnx.List([])
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(block(inputs, base * 2**stage, stride, dtype=dtype, rngs=rngs))
                inputs = base * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", layer)
        self.linear = Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (N, num_classes) for images x (N, H, W, 3)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        for stage in range(4):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return self.linear(x.mean((1, 2)))


class _BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1  # of the channels, from `planes` to the output

    def __init__(self, inputs: int, planes: int, stride: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(inputs, planes, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(planes)
        self.conv2 = Conv(planes, planes, 3, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(planes)
        self.shortcut = _shortcut(inputs, planes, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        return _join(self.bn2(self.conv2(y)), x, self.shortcut)


class _Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut; the 3 x 3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(inputs, planes, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(planes)
        self.conv2 = Conv(planes, planes, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(planes)
        self.conv3 = Conv(planes, 4 * planes, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(4 * planes)
        self.shortcut = _shortcut(inputs, 4 * planes, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        return _join(self.bn3(self.conv3(y)), x, self.shortcut)


def _shortcut(inputs: int, outputs: int, stride: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> nnx.List:
    """Return nothing to apply where the shapes agree, else a 1 x 1 convolution and a norm."""
    if stride == 1 and inputs == outputs:
        return nnx.List([])
    return nnx.List([Conv(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs), BatchNorm(outputs)])


def _join(y: jax.Array, x: jax.Array, shortcut: nnx.List) -> jax.Array:
    """Add the shortcut of x (N, H, W, C) to y (N, H / stride, W / stride, C')."""
    for module in shortcut:
        x = module(x)
    return jax.nn.relu(y + x)
