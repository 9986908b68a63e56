"""The networks by name, with the rules on their parameter names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from flax import nnx

from . import resnet, vgg


class Architecture(NamedTuple):
    """A network and what a program needs to know of it."""

    build: Callable[..., nnx.Module]  # (num_classes=, width=, dtype=, rngs=) -> model on (N, 32, 32, 3) -> logits
    exclude: tuple[str, ...]  # regexes: kernels of the first and the last layer
    follow: Mapping[str, str]  # regex of a norm's parameter -> template of the kernel it follows by name
    follow_order: Mapping[str, str]  # the same, by position after a convolution


_RESNET = resnet.EXCLUDE, resnet.FOLLOW, resnet.FOLLOW_ORDER
_VGG = vgg.EXCLUDE, vgg.FOLLOW, vgg.FOLLOW_ORDER
MODELS = {f"resnet{depth}": Architecture(partial(resnet.ResNet, depth), *_RESNET) for depth in resnet.STAGES}
MODELS |= {f"vgg{depth}": Architecture(partial(vgg.VGG, depth), *_VGG) for depth in vgg.CONVOLUTIONS}
