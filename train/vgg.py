"""VGG-16 and 19 with batch norm for images of 32 x 32, and one linear layer at the end.

Names read as in torch, numbered by position with the pooling layers counted: `features/conv_1/kernel`,
`features/bn_1/scale`, `features/conv_4/bias`, `linear/kernel`.

References:
    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, arXiv:1409.1556.
"""

from collections.abc import Iterator

import jax
from flax import nnx
from jax.typing import DTypeLike

from .modules import BatchNorm, Conv, Linear

# As in `train.resnet`; here every norm has a convolution of its name.
EXCLUDE = (r"features/conv_1/kernel", r"linear/kernel")
FOLLOW = {r"(.*)bn(_\d+)/.*": r"\1conv\2/kernel"}
FOLLOW_ORDER = FOLLOW

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # before each pooling, columns D and E of Table 1
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nnx.Module):
    """Plain stack of 3 x 3 convolutions; `model.train()` and `model.eval()` choose the statistics of the norms."""

    def __init__(
        self, depth: int, num_classes: int, width: float = 1.0, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        """Draw the parameters; `width` is a factor on all channels, rounded down, `dtype` the type to compute in."""
        self.features = nnx.Dict({})
        self.stages = CONVOLUTIONS[depth]
        inputs = 3
        for positions, channels in zip(_positions(self.stages), CHANNELS, strict=True):
            outputs = int(channels * width)
            for position in positions:
                self.features[f"conv_{position}"] = Conv(inputs, outputs, 3, bias=True, dtype=dtype, rngs=rngs)
                self.features[f"bn_{position}"] = BatchNorm(outputs)
                inputs = outputs
        self.linear = Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (N, num_classes) for images x (N, 32, 32, 3)."""
        for positions in _positions(self.stages):
            for position in positions:
                x = self.features[f"conv_{position}"](x)
                x = jax.nn.relu(self.features[f"bn_{position}"](x))
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        return self.linear(x.reshape(x.shape[0], -1))


def _positions(stages: tuple[int, ...]) -> Iterator[range]:
    """Number the convolutions from 1, a pooling after each stage taking a number too: (2, 2) -> 1, 2 and 4, 5."""
    first = 1
    for count in stages:
        yield range(first, first + count)
        first += count + 1
