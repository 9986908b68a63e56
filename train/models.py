"""The networks by name, with the rules on their parameter names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from flax import nnx

from . import resnet, vgg


@dataclass(frozen=True)
class Architecture:
    """A network and what a program needs to know of it."""

    build: Callable[..., nnx.Module]  # (num_classes=, width=, dtype=, rngs=) -> model on (N, 32, 32, 3) -> logits
    exclude: tuple[str, ...]  # regexes: kernels of the first and the last layer
    follow: Mapping[str, str]  # regex of a norm's parameter -> template of the kernel it follows by name
    follow_order: Mapping[str, str]  # the same, by position after a convolution


def _architecture(family, network: Callable[..., nnx.Module], depth: int) -> Architecture:
    return Architecture(partial(network, depth), family.EXCLUDE, family.FOLLOW, family.FOLLOW_ORDER)


MODELS: dict[str, Architecture] = {
    "resnet18": _architecture(resnet, resnet.ResNet, 18),
    "resnet34": _architecture(resnet, resnet.ResNet, 34),
    "resnet50": _architecture(resnet, resnet.ResNet, 50),
    "vgg16": _architecture(vgg, vgg.VGG, 16),
    "vgg19": _architecture(vgg, vgg.VGG, 19),
}
