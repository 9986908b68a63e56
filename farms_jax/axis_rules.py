"""What the axes of well-known networks count: ready `AxisRules`, for `axes=`.

>>> import farms_jax
>>> rules = farms_jax.axis_rules.maxtext(scan_axis=1)
>>> rules.axes[".*/out/kernel"]
'IIO|IO'
"""

import itertools
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from farms_jax._axes import FLAX_AXES, TORCH_AXES
from farms_jax._axis_rules import AxisRules
from farms_jax._default_axes import is_small
from farms_jax._names import is_box, name_of
from farms_jax._torch_axes import mlx as mlx, torch as torch
from farms_jax.errors import InputError, one_line, short_repr

# Dense layers with several axes on one side: query, key and value give heads, `out` takes them. In some models heads
# are merged already.
_ATTENTION = {r".*/(query|key|value)/kernel": "IOO|IO", r".*/out/kernel": "IIO|IO"}

# Kernels of einsums, with keys and values, or gate and up, in one leaf.
_GEMMA_AXES = {r".*/(q|k|qkv|kv)_einsum/w": "OIO", r".*/attn_vec_einsum/w": "IIO"}


def _gemma_stacks() -> dict[str, int | tuple[int, ...]]:
    """Return the stacks in Gemma's models: of keys and values, of gate and up, of experts; and of scanned layers."""
    both = r"((qkv|kv)_einsum/w|gating_einsum(/w)?)"
    scanned = r"(.*/)?layers/\D[^/]*/"  # where layers are not scanned, a number follows
    return {
        r".*/moe/gating_einsum": (0, 1),
        r".*/moe/linear|.*/mlp/(gate|up|down)_proj": 0,
        scanned + rf"(.*/)?{both}": (0, 1),
        scanned + r".*": 0,
        rf".*/{both}": 0,
    }


def flax_attention() -> AxisRules:
    """Return the axes of Flax's attention, Linen and NNX, which are recognised without them too."""
    return AxisRules(_ATTENTION)


def maxtext(scan_axis: int = 1) -> AxisRules:
    """Return the axes of MaxText's decoders, Linen and NNX, mixtures of experts included, with scanned layers or not.

    Args:
        scan_axis: its setting `param_scan_axis`.
    """
    scanned = r".*decoder/((dense_|moe_)?layers(_outside_pipeline|_\d+_\d+)?|scanned_blocks)/"
    experts = r".*/(wi|wi_0|wi_1|wo)"  # the leaf itself; of a dense layer it is the module
    # The experts' axis comes before or after that of the layers.
    of_experts = (scan_axis, 1 if scan_axis == 0 else 0)
    return AxisRules(
        {
            r".*/(wq_b|wkv_b)/kernel": "IOO",  # multi-head latent attention
            r".*/qkv_proj/kernel": "IOO|IOOO",
            r".*/mlp/wi/kernel": "IO|IOO",  # the activations side by side
            experts: "IO",
            **_ATTENTION,
        },
        stack={scanned + experts + "(_bias)?": of_experts, scanned + r".*": scan_axis, experts + "(_bias)?": 0},
    )


def tunix() -> AxisRules:
    """Return the axes of Tunix's models and of Gemma's: einsum kernels, keys and values in one leaf."""
    return AxisRules(
        {
            **_GEMMA_AXES,
            r".*/(q|k|v)_proj/(w|kernel)": "IOO|IO",
            r".*/o_proj/(w|kernel)": "IIO|IO",
        },
        stack={r".*/(qkv|kv)_einsum/(w_lora_b|lora/b)": 1, **_gemma_stacks()},
    )


def big_vision() -> AxisRules:
    """Return the axes of big_vision's transformers, scanned or not, its Gemma included."""
    return AxisRules(
        {**_ATTENTION, **_GEMMA_AXES},
        stack={r".*encoderblock/.*": 0, r".*EncDecBlock/.*": 1, **_gemma_stacks()},
    )


def haiku() -> AxisRules:
    """Return the axes of Haiku's networks: the parameters of `hk.layer_stack` count layers by their first axis."""
    return AxisRules(stack={r".*layer_stack.*layer_stack.*": (0, 1), r".*layer_stack.*": 0})


def equinox(params: Any) -> AxisRules:
    """Return the axes of Equinox's modules, by their types: outputs, inputs, kernel positions; norms have no matrices.

    Layers that `eqx.filter_vmap` has stacked are layers of their own. A function of the parameters: give it as it is,
    `axes=farms_jax.axis_rules.equinox`.

    Args:
        params: a model, or one filtered to its arrays.
    """
    spellings: dict[str, str | None] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    modules = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_equinox_module)
    for name, module in ((name_of(path), module) for path, module in modules if is_equinox_module(module)):
        weight = _exactly(name, "weight")
        spellings[weight] = None if _is_norm(module) else "OI" + "K" * getattr(module, "num_spatial_dims", 0)
        # Of layers made by `eqx.filter_vmap`, its first axes count them.
        extra = getattr(module.weight, "ndim", 0) - len(spellings[weight] or "")
        if extra > 0 and spellings[weight]:
            stacks[weight] = tuple(range(extra))
    return AxisRules(spellings, stacks, default=TORCH_AXES)


def is_equinox_module(node: Any) -> bool:
    """Tell whether a node is a layer of Equinox with a weight, whose type says what its axes count."""
    kinds = [kind for kind in type(node).__mro__ if kind.__module__.startswith("equinox.nn")]
    return len(kinds) > 0 and hasattr(node, "weight")


def _is_norm(module: Any) -> bool:
    return any(kind.__name__.endswith("Norm") for kind in type(module).__mro__)


_STACK = re.compile(
    r"(.*_)?layers?(_.*)?|(.*_)?blocks?|stages?|experts?|exp(_.*)?|circular_repeats"  # pipelines repeat their stages
)
_HEADS = re.compile(r"(.*_)?heads?(_per_group|_dim|_size)?|kv|qkv")


def logical_names(params: Any) -> AxisRules:
    """Return the axes of a model by the logical names that Flax's modules give them, Linen and NNX, or Haliax's.

    A function of the parameters with their names, that is, before Linen's are unboxed: give it as it is,
    `axes=farms_jax.axis_rules.logical_names`, or what it returns. Axes called `layers` or `experts`, or the like, are a
    stack. Of the others, those of heads are merged; the first is the inputs, the second the outputs.

    Args:
        params: a tree of boxes, or an NNX state.
    """
    spellings: dict[str, str] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    for path, box in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        names = _names_of(box)
        if not names:
            continue
        name = name_of(path)
        stacks[name] = tuple(axis for axis, own in enumerate(names) if _STACK.fullmatch(str(own)))
        others = [str(own) for axis, own in enumerate(names) if axis not in stacks[name]]
        if is_small(name, len(others)):
            continue
        rest = [_HEADS.fullmatch(own) is not None for own in others]
        groups = [len(list(same)) for _, same in itertools.groupby(rest)] if any(rest) else [1] * len(rest)
        if len(groups) == 2:
            spellings[name] = "I" * groups[0] + "O" * groups[1]
    return AxisRules(
        {re.escape(name): spelling for name, spelling in spellings.items()},
        {re.escape(name): axes for name, axes in stacks.items() if axes},
    )


def _names_of(box: Any) -> tuple[Any, ...]:
    """Return the names of the axes in a box of Linen, a variable of NNX or a named array; none where it has none."""
    if hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        return tuple(metadata.get("out_sharding") or metadata.get("sharding_names") or ())
    named = [getattr(axis, "name", None) for axis in getattr(box, "axes", ())]  # of Haliax
    return tuple(getattr(box, "names", named))


def _exactly(module: str, leaf: str) -> str:
    return re.escape(f"{module}/{leaf}" if module else leaf)


def read_rules(path: Path) -> AxisRules:
    """Read rules from a TOML or JSON file.

    It has the tables `axes`, from patterns to spellings (`"none"` for no matrix), and `stack`, from patterns to an axis
    or a list of axes; and `default`, `"flax"` or `"torch"`. All are optional; without a default, what no pattern
    matches goes by the format of the checkpoint.

    Args:
        path: the file; one that ends in `.json` is JSON.

    Returns:
        The rules.

    Raises:
        InputError: it cannot be read, or has something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no TOML or JSON file of axes ({one_line(error)})") from error
    known = {"axes": {}, "stack": {}, "default": None}
    unknown = sorted(content.keys() - known.keys()) if isinstance(content, dict) else [content]
    if unknown:
        raise InputError(
            f"{path}: {short_repr(unknown[0])} is not known; it may have the tables `axes` and `stack`, and `default`"
        )
    content = known | content
    for key in ("axes", "stack"):
        if not isinstance(content[key], dict):
            raise InputError(f"{path}: {key} must be a table with patterns as its keys; got {content[key]!r}")
    defaults = {"None": None, "flax": FLAX_AXES, "torch": TORCH_AXES}
    if str(content["default"]) not in defaults:
        raise InputError(f"{path}: default must be 'flax' or 'torch', got {content['default']!r}")
    spellings = {pattern: None if spelling == "none" else spelling for pattern, spelling in content["axes"].items()}
    stacks = {pattern: tuple(axes) if isinstance(axes, list) else axes for pattern, axes in content["stack"].items()}
    for key, value in spellings.items():
        if not isinstance(value, str | None):
            raise InputError(f'{path}: axes.{key} must be letters such as "IO", or "none"; got {value!r}')
    for key, value in stacks.items():
        if not all(type(axis) is int for axis in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{path}: stack.{key} must be an axis or a list of axes; got {value!r}")
    return AxisRules(spellings, stacks, defaults[str(content["default"])], file=str(path))


NAMED: dict[str, AxisRules | Callable[[Any], AxisRules]] = {
    "flax": AxisRules(),
    "torch": torch,
    "mlx": mlx,
    "maxtext": maxtext(),
    "maxtext-scan-0": maxtext(scan_axis=0),
    "tunix": tunix(),
    "big_vision": big_vision(),
    "haiku": haiku(),
    "equinox": AxisRules(default=TORCH_AXES),
}
"""Values of `axes=` by the name that the command line gives them."""
