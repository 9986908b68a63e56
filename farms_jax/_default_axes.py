"""What the axes of a leaf count where nothing is declared: by names and shapes of its module together."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from farms_jax._axes import Axes

_SMALL = re.compile(
    r"(.*_)?bias(es)?(_.*)?|b(_?\d+|_?[a-zA-Z]|_(in|out|up|down|gate))?|"
    r"(.*_)?(scale|offset|beta|gamma)s?(_?\d+|_[a-z])?|A_log"  # A_log: of Mamba
)
_NORM = re.compile(
    r"(?i)(.*[/.])?(\w*norm(_?\d+|_[a-z])?|(\w*_)?(ln(_\w+)?|bn)\d*)([/.](weight|w|kernel|scale|g)|_weight|_w)?"
)
_TABLE = r"([/.](embeddings?|weight|w|table))?"
_POSITIONS = re.compile(
    r"(.*[/._])?(wpe|pos(ition|itional)?_?(emb\w*|enc\w*|table)|embed_positions?|relative_attention_bias|"
    rf"rel(ative)?_?(pos(ition)?_?)?(emb\w*|table)){_TABLE}|"
    rf"(.*[/.])?((abs_|rel_)?pos(_[hw])?|positions?|W_pos){_TABLE}|(.*[/.])?pe"
)
_LORA = re.compile(r"((?:.*[/.])?(?:\w*lora_|lora[/.]))([ab])", re.IGNORECASE)
BY_NAME = "bias, norm or other vector", "embedding of positions"  # reasons why a matrix is no layer
_LONGEST_POSITIONS = 32  # patches of vision transformers are up to 32 pixels wide; embeddings and stacks are longer
_SMALL_POSITIONS = 7  # other kernels seldom have more, along an axis
_FEW_CHANNELS = 16

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the leaves without the axes of their stacks, by name."""


class LeftOut(NamedTuple):
    """Why a leaf is no layer.

    Attributes:
        reason: the reason, for people.
        undeclared: it may well be a weight, but nothing says what its axes count.
    """

    reason: str
    undeclared: bool = False


def is_small(name: str, ndim: int) -> bool:
    """Tell whether a leaf is a bias, the scale of a norm or the like, which is never a layer but follows one."""
    return ndim < 2 or _SMALL.fullmatch(re.split(r"[/.]", name)[-1].removesuffix(":0")) is not None


def default_spelling(name: str, shapes: Shapes, default: Axes) -> str | Axes | LeftOut:
    """Return the spelling of a leaf's axes (see `AxisRules`), or why it is no layer."""
    shape = shapes[name]
    if spelling := _low_rank(name, shapes, default):
        return spelling
    is_token = len(shape) == 3 and sum(size > 1 for size in shape) < 2  # (1, 1, n)
    if is_small(name, len(shape)) or is_token or is_norm(name, shapes):
        return LeftOut(BY_NAME[0])
    if is_positions(name, shapes):
        return LeftOut(BY_NAME[1])
    if len(shape) == 2:
        return default
    if spelling := _attention(name, shapes) or _dense_general(name, shapes):
        return spelling
    if len(shape) != 4:
        return LeftOut(f"{len(shape)} axes: say with `axes` or `stack` what they count", undeclared=True)
    if _may_be_convolution(name, shapes, default):
        return default
    return LeftOut("4 axes that are no convolution's: say with `axes` or `stack` what they count", undeclared=True)


def _low_rank(name: str, shapes: Shapes, default: Axes) -> str | Axes | None:
    """Return the spelling of one of the two factors of an adapter, LoRA: the rank is last in a, and first in b."""
    parts = _LORA.fullmatch(name)
    if parts is None:
        return None
    first, second = (shapes.get(parts[1] + letter, ()) for letter in ("ab" if parts[2].islower() else "AB"))
    if min(len(first), len(second)) < 2:
        return None
    if len(shapes[name]) == 2:
        return default
    if first[-1] != second[0]:
        return None
    return "I" * (len(first) - 1) + "O" if parts[2] in "aA" else "I" + "O" * (len(second) - 1)


def is_norm(name: str, shapes: Shapes) -> bool:
    """Tell whether a leaf multiplies element by element: its bias has its own shape, or its module is called a norm."""
    bias = shapes.get(_beside(name, "bias"))
    is_called_so = len(shapes[name]) < 4 and _NORM.fullmatch(name) is not None
    return is_called_so if bias is None else bias == shapes[name]


def is_positions(name: str, shapes: Shapes) -> bool:
    """Tell whether a leaf is a table of positions by its name; a dense layer that is called so has a bias."""
    has_bias = not shapes.keys().isdisjoint({_beside(name, "bias"), _beside(name, "b")})
    is_dense = has_bias and re.search(r"[/.](weight|w)$", name) is not None
    return not is_dense and _POSITIONS.fullmatch(name) is not None


def _attention(name: str, shapes: Shapes) -> str | None:
    """Return the spelling of a kernel of Flax's attention.

    The kernels of query, key and value, (inputs, heads, head size), and that of `out`, (heads, head size, outputs),
    share heads and head size, apart from grouped keys and values, which have fewer heads. Those of an attention to
    something else have inputs of their own.
    """
    parts = re.fullmatch(r"(.*[/.])?(query|key|value|out)([/.]kernel)", name)
    if parts is None:
        return None
    query, out = (shapes.get(f"{parts[1] or ''}{which}{parts[3]}", ()) for which in ("query", "out"))
    if len(query) != 3 or len(out) != 3 or query[1:] != out[:2] or len(shapes[name]) != 3:
        return None
    if parts[2] == "out":
        return "IIO"
    _, heads, size = shapes[name]
    return "IOO" if query[1] % heads == 0 and size == query[2] else None


def _dense_general(name: str, shapes: Shapes) -> str | None:
    """Return the spelling of a kernel of Flax's `DenseGeneral`, whose bias has the shape of its outputs."""
    if not re.fullmatch(r"(.*[/.])?(DenseGeneral_\d+|query|key|value|qkv)[/.]kernel", name):
        return None
    shape, bias = shapes[name], shapes.get(_beside(name, "bias"), ())
    inputs = len(shape) - len(bias)
    # In a stack of layers, the first axis of both counts them.
    if inputs < 1 or len(bias) < 1 or shape[inputs:] != bias or shape[0] == bias[0]:
        return None
    # Or the last axis, which vectors then have too.
    vectors = (own for other, own in shapes.items() if other.endswith(("scale", "out/bias", "out.bias")))
    if any(len(own) > 1 and own[-1] == bias[-1] for own in vectors):
        return None
    return "I" * inputs + "O" * len(bias)


def _may_be_convolution(name: str, shapes: Shapes, default: Axes) -> bool:
    # A stack of layers, or attention, has a long axis in place of a position, or a bias with several axes.
    shape, bias = shapes[name], shapes.get(_beside(name, "bias"), ())
    positions = [size for axis, size in enumerate(shape) if axis not in {default.rows % 4, default.cols % 4}]
    channels = shape[default.rows], shape[default.cols]
    if max(positions) > _LONGEST_POSITIONS or sum(size > 1 for size in bias) > 1:
        return False
    modules = "/".join(re.split(r"[/.]", name)[-3:])
    if re.search(r"(?i)moe|expert", modules):
        return False
    is_square = min(positions) in {1, max(positions)}
    # A patch of an image has few channels.
    if not (is_square and (max(positions) <= _SMALL_POSITIONS or min(channels) <= _FEW_CHANNELS)):
        return re.search(r"(?i)conv|patch|stem|reduction|/sr/", modules) is not None  # sr: spatial reduction
    return positions == [1, 1] or not _in_attention(name, shapes)


def _in_attention(name: str, shapes: Shapes) -> bool:
    parts = re.fullmatch(r"(.*[/.])?(query|key|value|out)[/.][^/.]*", name)
    return parts is not None and any(other.startswith(f"{parts[1] or ''}query") for other in shapes)


def _beside(name: str, leaf: str) -> str:
    """Return the name of another leaf of the same module."""
    return re.sub(r"[^/.]*$", leaf, name, count=1)
