"""Quantised weights in a checkpoint: arrays that together stand for one weight, by a rule that is written there.

The rule is written in the names, shapes and dtypes of the arrays and in the model's configuration
(`quantization_config` of transformers, `quantization` of MLX). Where it is not, a weight is left out with the reason.

>>> import numpy as np
>>> stored = {
...     "up.weight": TensorInfo(np.dtype("int8"), (6, 4)),
...     "up.SCB": TensorInfo(np.dtype("float32"), (6,)),
...     "down.codes": TensorInfo(np.dtype("int16"), (8, 4)),
... }
>>> found = find(stored, {}, lambda name: np.zeros(()))
>>> found.weights["up.weight"].info, found.parts
(TensorInfo(dtype=dtype('float32'), shape=(6, 4)), {'up.SCB': 'part of the quantised weight up.weight'})
>>> found.unread
{'down.codes': 'quantised by a rule that the checkpoint does not tell'}
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax.errors import InputError, printable
from farms_jax.weights import quantised_rules as packed, quantised_scaled as scaled
from farms_jax.weights.quantised_parts import Rule, Stored, Weight
from farms_jax.weights.reading import TensorInfo, read_json

_RULES: tuple[Rule, ...] = (
    packed.awq,
    packed.gptq,
    packed.bitsandbytes_int8,
    packed.bitsandbytes_4bit,
    packed.mlx,
    scaled.bitnet,
    scaled.gemma,
    scaled.scaled,
    scaled.torchao,
    packed.compressed_integers,
    scaled.four_bit_floats,
    scaled.mxfp4_blocks,
    packed.hqq,
    packed.aqlm,
)
# Methods that are known by their names alone: one array, and one beside it, of those that have no rule here.
_UNDONE = {
    ("trellis", "suh"): "EXL3, whose codes are those of a trellis",
    ("trellis", "SU"): "QTIP, whose codes are those of a trellis",
    ("q_weight", "q_scale_max"): "EXL2, whose bits differ from row to row, in an order of its own",
    ("indices", "centroids.weight"): "VPTQ, by packed places in codebooks",
    ("outlier_indices", "outlier_centroids.weight"): "VPTQ, by packed places in codebooks",
    ("res_indices", "res_centroids.weight"): "VPTQ, by packed places in codebooks",
    ("dense_weights", "row_offsets"): "SpQR, in the order of a GPU's kernel, with outliers beside it",
    ("weight", "tables2"): "HIGGS or FLUTE, in the order of a GPU's kernel",
    ("weight", "weight_scales"): "EETQ, in the order of a GPU's kernel",
    ("qweight", "act_global_scale"): "FP-Quant, of the weight times a Hadamard matrix",
    ("qweight", "lookup_table"): "SqueezeLLM, by packed places in a table for each row",
    ("Qidxs", "SU"): "QuIP#, by places in a lattice",
    ("B", "s"): "Marlin, in the order of a GPU's kernel",
}
# How auto-round calls what it writes in the formats of others.
_AUTO_ROUND = {
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_awq": {"quant_method": "awq"},
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
}
_CONFIG = "config.json"
_OWN_CONFIG = "quantize_config.json"  # of GPTQ's first tools, beside the model's
# How the tools call arrays of integers that are weights; all other names are buffers' without a configuration.
_PACKED = re.compile(
    r"(.*_)?(qweight|W_q|q_weight|weight_packed|weight_q|Qidxs.*|codes|trellis|weight|kernel|_data|quantized_weight|"
    r"dense_weights|blocks|qdata|(outlier_|res_)?indices|B|(embedding|weight)_(quantized|values))"
)
_COMPANION = re.compile(
    r"(.*_)?(q?scales?|scale_(inv|weight|input)|q?zeros?|zero_points?|qbiases|g_idx|SCB|weight_(format|shape)|absmax|"
    r"(in|out)put_scale(_ub)?|global_scale|scale_and_zero|codebooks?|centroids|invperm|_scale|_shift|input_global_scale)(_\d)?"
)
_BUFFER = re.compile(r"(.*_)?(ids?|index|idxs?|mask|tracked|counts?|steps?|keys?|tokens?)(_.*)?")


class Found(NamedTuple):
    """What of a checkpoint is quantised.

    Attributes:
        weights: name -> a weight that can be dequantised.
        parts: stored array -> which weight it is a part of.
        unread: stored array -> why the weight that it holds cannot be dequantised.
    """

    weights: dict[str, Weight]
    parts: dict[str, str]
    unread: dict[str, str]

    def summary(self) -> str:
        """Return in words how many weights are quantised in which way.

        >>> Found({}, {}, {"codes": "quantised by aqlm, whose rule is not known here"}).summary()
        '1 not read'
        """
        counts = Counter(weight.method for weight in self.weights.values())
        told = [f"{method} ({count} weight{'s' * (count > 1)})" for method, count in counts.most_common()]
        return ", ".join([*told, *([f"{len(self.unread)} not read"] if self.unread else [])])


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> Found:
    """Find the quantised weights among a checkpoint's arrays.

    Args:
        tensors: stored array -> dtype and shape.
        config: how the model was quantised, as `read_config` returns it.
        read: reads a small array that says how others are to be read.

    Returns:
        The weights, and what else is in the checkpoint for their sake.
    """
    found = Found({}, {}, {})
    for name, info in tensors.items():
        if _is_plain(info) and not _is_kept_as_float(name, tensors):
            continue
        outcome = _by_a_rule(Stored(name, tensors, config, read))
        if isinstance(outcome, Weight) and (outcome.name == name or outcome.name not in tensors):
            found.weights[outcome.name] = outcome
            told = f"part of the quantised weight {outcome.name}"
            found.parts.update({part: told for part in outcome.parts.values() if part != outcome.name})
        elif isinstance(outcome, str):
            found.unread[name] = outcome
    for name in found.parts.keys() & found.unread.keys():
        del found.unread[name]
    _add_companions(found, tensors)
    return found


def _is_kept_as_float(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether an array is of integers whose bits are stored as those of floats, as VPTQ may do."""
    module, leaf = _parted(name)
    return leaf.endswith("indices") and f"{module}.{leaf.removesuffix('indices')}centroids.weight" in tensors


def _is_plain(info: TensorInfo) -> bool:
    """Tell whether an array is nothing quantised: a scalar, or of floats of 16 bits and more."""
    return not info.shape or 0 in info.shape or not (info.dtype.kind in "iu" or is_small_float(info.dtype))


def is_small_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype is a float of at most a byte, whose numbers say little without scales."""
    return dtype.name.startswith(("float8_", "float6_", "float4_"))


def _by_a_rule(stored: Stored) -> Weight | str | None:
    """Return the weight that an array holds, or why it cannot be told; `None` where it holds none."""
    leaf = _parted(stored.name)[1]
    for (own, other), method in _UNDONE.items():
        if leaf == own and stored.beside(other=other):
            return f"quantised by {method}: not undone here"
    try:
        for rule in _RULES:
            if (outcome := rule(stored)) is not None:
                return outcome
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ):  # of shapes and settings that no tool writes
        return "quantised, but its parts or its settings are none that belong together"
    if is_small_float(stored.info.dtype):
        return f"{stored.info.dtype} without its scales"
    if len(stored.info.shape) < 2 or _COMPANION.fullmatch(leaf) or _BUFFER.fullmatch(leaf):
        return None
    if method := stored.config.get("quant_method"):
        return f"quantised by {printable(str(method))}, whose rule is not known here"
    return "quantised by a rule that the checkpoint does not tell" if _PACKED.fullmatch(leaf) else None


def _add_companions(found: Found, tensors: Mapping[str, TensorInfo]) -> None:
    """Add scales and the like that no rule needs: those of the same module, or below the weight's own name.

    Of a module whose integers are not understood, that is all but its bias.
    """
    modules, whole = {}, {}
    for name in (*found.weights, *found.unread):
        module, leaf = _parted(name)
        if not _COMPANION.fullmatch(leaf):
            modules.setdefault(name, name)
            modules.setdefault(module, name)
            if name in found.unread and not is_small_float(tensors[name].dtype):
                whole.setdefault(module, name)
    for name in tensors:
        if name in found.parts or name in found.weights:
            continue
        module, leaf = _parted(name)
        if _COMPANION.fullmatch(leaf):
            weight = modules.get(module) or modules.get(_parted(module)[0])
        elif name in found.unread or leaf == "bias":
            weight = None
        else:
            outer = [module, _parted(module)[0]]
            weight = next((place for place in outer if place in found.weights), None)
            weight = weight or next((whole[place] for place in outer if place in whole), None)
        if weight is not None and weight != name:
            found.parts[name] = f"part of the quantised weight {weight}"
            found.unread.pop(name, None)


def _parted(name: str) -> tuple[str, str]:
    """Return the names of the module and of the array in it.

    >>> _parted("up.weight"), _parted("weight")
    (('up', 'weight'), ('', 'weight'))
    """
    place = max(name.rfind("."), name.rfind("/"))
    return name[: max(0, place)], name[place + 1 :]


def read_config(folder: Path) -> dict[str, Any]:
    """Return how the model of a folder was quantised, with `quant_method` among it; empty where nothing says so."""
    for filename, keys in ((_CONFIG, ("quantization_config", "quantization")), (_OWN_CONFIG, (None,))):
        try:
            content = read_json(folder / filename, "")
        except InputError:
            continue  # what is wrong with it is no matter of the weights
        nested = content.get("text_config")
        for key in keys:
            for outer in (content, nested if isinstance(nested, dict) else {}):
                own = outer if key is None else outer.get(key)
                if isinstance(own, dict) and own:
                    usual = "mlx" if key == "quantization" else "gptq"
                    return {"quant_method": usual} | own | _AUTO_ROUND.get(str(own.get("packing_format")), {})
    return {}
