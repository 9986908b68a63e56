"""What the axes of Torch's, GGUF's and MLX's checkpoints count: by names and shapes, with experts in one tensor."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from farms_jax._axes import MLX_AXES, TORCH_AXES, Axes
from farms_jax._axis_rules import AxisRules
from farms_jax._default_axes import is_positions
from farms_jax._names import name_of

_EXPERTS = re.compile(
    r"(.*[/.])?(experts[/.].*|switch_(mlp|glu)[/.].*|(input|output)_linear\.weight|ffn_\w+_exps\.weight)"
)
_CONVOLUTION = re.compile(r"(.*[/.])?([^/.]*conv[^/.]*([/.]\d+)*|patch_embed[^/.]*[/.]proj)[/.]weight")
# The state transitions of Mamba, its depthwise convolution in GGUF, and biases of attention by distance.
_NO_MATRIX = re.compile(r"(.*[/.])?(A_log|ssm_a|ssm_conv1d[/.]weight|(relative_attention_bias|attn_rel_b)[/.]weight)")

# By the classes of Torch, and of transformers' GPT-2; inputs first in transposed convolutions, too.
_CLASSES = {
    "Linear": "OI",
    "Conv": "OI",
    "ConvTranspose": "IO",
    "Bilinear": "OII",
    "Embedding": "IO",
    "EmbeddingBag": "IO",
    "Conv1D": "IO",
}
_CLASS = re.compile(r"(?:torch\.(?:ao\.)?nn|transformers)\..*\.(?:Lazy)?(\w+?)(?:[123]d)?")
_WEIGHT = re.compile(r"(?:.*\.)?(?:weight(?:_v|_orig)?|parametrizations\.weight\.original\d?)")

_Shapes = Mapping[str, tuple[int, ...]]


def torch(params: Any) -> AxisRules:
    """Return the axes of Torch's checkpoints, and of GGUF's: (outputs, inputs, ...), experts in one tensor as a stack.

    A function of the parameters: give it as it is, `axes=farms_jax.axis_rules.torch`. Experts are (experts, outputs,
    inputs), or (experts, inputs, outputs) as in gpt-oss and Llama 4: the shapes of a module's two tensors tell.

    Args:
        params: arrays by name, or anything with their shapes.
    """
    return _outputs_first(params, TORCH_AXES, last="K")


def mlx(params: Any) -> AxisRules:
    """Return the axes of MLX's checkpoints: (outputs, ..., inputs), experts in one tensor as a stack.

    A function of the parameters: give it as it is, `axes=farms_jax.axis_rules.mlx`.

    Args:
        params: arrays by name, or anything with their shapes.
    """
    return _outputs_first(params, MLX_AXES, last="I")


def _outputs_first(params: Any, default: Axes, last: str) -> AxisRules:
    """Return the axes of weights whose outputs come first, by what their last axis counts: inputs, or positions."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: hasattr(node, "shape"))
    shapes: dict[str, tuple[int, ...]] = {name_of(path): tuple(getattr(leaf, "shape", ())) for path, leaf in leaves}
    spellings: dict[str, str | None] = {}
    stack: dict[str, int] = {}
    for name, shape in shapes.items():
        # One pattern for all blocks.
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
        if _NO_MATRIX.fullmatch(name):
            spellings[pattern] = None
        elif len(shape) == 3 and (match := _EXPERTS.fullmatch(name)):
            spellings[pattern] = _of_experts(match[1] or "", shapes)
            stack[pattern] = 0
        elif len(shape) in {3, 5} and _CONVOLUTION.fullmatch(name):
            # A depthwise convolution mixes no channels.
            inputs, positions = (shape[-1], shape[1:-1]) if last == "I" else (shape[1], shape[2:])
            spelling = "O" + "K" * len(positions) + "I" if last == "I" else "OI" + "K" * len(positions)
            spellings[pattern] = None if inputs == 1 else spelling
    return AxisRules(spellings, stack, default=default)


def of_classes(rules: AxisRules, classes: Mapping[str, Sequence[str]], params: Mapping[str, Any]) -> AxisRules:
    """Return rules in which what the class of a weight's module says comes before what its name does.

    Args:
        rules: rules by names.
        classes: full names of the classes of the module, by the name of the weight.
        params: arrays by name, or anything with their shapes.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in params.items()}
    spellings: dict[str, str | None] = {}
    for name, shape in shapes.items():
        known = (_CLASSES.get(match[1]) for kind in classes.get(name, ()) if (match := _CLASS.fullmatch(kind)))
        spelling = next(filter(None, known), None)
        if spelling is None or not _WEIGHT.fullmatch(name) or is_positions(name, shapes):
            continue
        positions = len(shape) - len(spelling)
        if positions >= 0 and not (positions in {1, 3} and shape[1] == 1):  # depthwise: as by its name
            spellings[re.escape(name)] = spelling + "K" * positions
    return dataclasses.replace(rules, axes=spellings | dict(rules.axes))


def _of_experts(module: str, shapes: _Shapes) -> str:
    """Return the spelling of one expert.

    Gate and up in one tensor have two outputs for each input of the tensor that follows, whichever axis they are.
    """
    own = [shape for name, shape in shapes.items() if name.startswith(module) and len(shape) == 3]
    inputs_first = any(up[2] == 2 * down[1] and up[1] == down[2] for up in own for down in own)
    return "IO" if inputs_first else "OI"
