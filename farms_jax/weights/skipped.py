"""Tell a model's weights from what else is in a checkpoint: optimiser states, averages, adapters, tables, masks.

>>> import numpy as np
>>> matrix, count = TensorInfo(np.dtype("float32"), (3, 4)), TensorInfo(np.dtype("int32"), ())
>>> not_weights({"params/w": matrix, "opt_state/0/trace/w": matrix})
{'opt_state/0/trace/w': 'optimiser state'}
>>> not_weights({"0/w": matrix, "1/0/count": count, "1/0/mu/w": matrix, "1/0/nu/w": matrix})
{'1/0/count': 'optimiser state', '1/0/mu/w': 'optimiser state', '1/0/nu/w': 'optimiser state'}
>>> not_weights({"encoder/mu/w": matrix, "encoder/logvar/w": matrix})
{}
>>> not_weights({"up.weight": matrix, "up.weight.grad": matrix})
{'up.weight.grad': 'gradient of a weight'}
>>> list(not_weights({"up.weight": matrix, "up.lora_A.weight": matrix, "up.lora_B.weight": matrix}))
['up.lora_A.weight', 'up.lora_B.weight']
>>> not_weights({"up.weight": matrix, "ema.up.weight": matrix, "up.causal_mask": matrix})
{'ema.up.weight': 'moving average of the weights', 'up.causal_mask': 'mask'}
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from farms_jax.weights.beside import GRADIENT, IMPORTANCE, STATISTICS, beside_weights
from farms_jax.weights.reading import TensorInfo

OPTIMISER, AVERAGE = "optimiser state", "moving average of the weights"
COPY, MASK, TABLE = "copy of the model's weights, such as their average", "mask", "fixed table, no weight"
CACHE, ADAPTER = "kept activations", "part of an adapter (LoRA or the like), which is no layer by itself"
UNMERGED = "part of an adapter beside its base_layer, measured without it; model.merge_and_unload() of PEFT joins both"
BESIDE = "beside the model in the checkpoint"
OPTIONAL = frozenset({AVERAGE, COPY, ADAPTER, UNMERGED, BESIDE})
"""Reasons of arrays that are measured where they are asked for."""
_ALWAYS = {
    **dict.fromkeys(("opt_state", "optimizer", "optimizer_state", "optim_state", "optimizer_states"), OPTIMISER),
    **dict.fromkeys(
        ("optimizer_state_dict", "optimizer_states_dict", "optimizer_weights", "optimizers", "optim", "opt_states"),
        OPTIMISER,
    ),
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "max_exp_avg_sq"), OPTIMISER),
    **dict.fromkeys(
        ("momentum_buffer", "square_avg", "acc_delta", "state_sum", "exp_inf", "adam_m", "adam_v"), OPTIMISER
    ),
    **dict.fromkeys(("fp32_flat_groups", "single_partition_of_fp32_groups", "fp32_from_fp16"), OPTIMISER),
    **dict.fromkeys(("batch_stats", "running_mean", "running_var", "num_batches_tracked"), STATISTICS),
    **dict.fromkeys(
        ("moving_mean", "moving_variance", "cluster_size", "cluster_usage", "embed_sum", "spectral_stats"), STATISTICS
    ),
    **dict.fromkeys(("cached_key", "cached_value", "k_cache", "v_cache", "kv_cache", "intermediates", "queue"), CACHE),
}
# Words that modules may have too: they count only where the same arrays are elsewhere in the checkpoint.
_WHERE_MIRRORED = {
    **dict.fromkeys(("trace", "momentum", "velocity", "adam", "Adam", "Adam_1", "Momentum", "RMSProp"), OPTIMISER),
    **dict.fromkeys(
        ("ema", "ema_params", "params_ema", "ema_model", "model_ema", "ema_state", "ema_state_dict"), AVERAGE
    ),
    **dict.fromkeys(("state_dict_ema", "ema_weights", "ema_network", "ema_unet", "shadow", "shadow_params"), AVERAGE),
    **dict.fromkeys(("grad", "grads", "gradients"), GRADIENT),
    **dict.fromkeys(("fisher", "fisher_information", "fisher_diag", "importance", "omega"), IMPORTANCE),
    **dict.fromkeys(("averaged_model", "avg_model", "avg_params", "params_avg"), AVERAGE),
    **dict.fromkeys(("swa", "swa_model", "swa_params", "swa_state_dict", "polyak", "ema1", "ema2"), AVERAGE),
    **dict.fromkeys(("ExponentialMovingAverage", "model_ema_state_dict", "ema_variables", "ema_vars"), AVERAGE),
    **dict.fromkeys(("teacher", "teacher_model", "momentum_encoder", "encoder_k", "target_model"), COPY),
    **dict.fromkeys(("target_network", "target_params", "target_net", "target_encoder", "target_critic"), COPY),
    **dict.fromkeys(("critic_target", "actor_target", "target_actor", "qf_target", "q_target"), COPY),
}
_ADAM = frozenset({"mu", "nu", "ema", "count"})  # fields of optax's states that count their steps
_WRAPPERS = frozenset({"module", "model", "_orig_mod", "ema_model"})  # that a copy may have of its own
# Of one array, beside the one that it follows: `kernel_ema`, VQ-VAE's `_ema_w` and `embed_avg`.
_FOLLOWER = re.compile(r"(?:.*_)?ema(?:_.*)?|(?:weight|kernel|embed(?:ding)?|w)_avg")

_MASK = re.compile(
    r"(.*_)?(mask|masks|masked_bias|tril|triu|causal)(_(buffer|cache|\d+))?|masked_bias"  # attn.bias: by its shape
)
_TABLE = re.compile(
    r"((?:.*_)?(?:cos|sin|cosine|sine)_?(?:cached?|table|emb\w*|buffer|pos\w*)|cos|sin|cos_sin(?:_cache)?|"
    r"freqs?(?:_?(?:cos|sin|cis))(?:_(?:real|imag))?|freqs|inv_freq|rope_(?:freqs?|cache)|rotary_(?:cos|sin|emb)|"
    r"alibi(?:_\w+)?|slopes|(?:forward|backward)_hadamard_matrix|"
    r"mel_(?:filters|basis|fb)|fb|dct_mat|(?:forward|inverse)_basis|window_sum|"  # of spectrograms
    r"anchors?|anchor_grid|_float_tensor)"
)

# One of the two factors of LoRA, as PEFT, diffusers, kohya, MLX, Tunix and llama.cpp call them, and what other adapters
# have: LoHa, LoKr, DoRA, OFT, BOFT, IA3, VeRA.
_FACTOR = re.compile(r"(.*lora[_./](?:embedding_)?)(a|b|A|B|down|up)((?:[./][^./]+)*)")
_OTHER_FACTOR = {"a": "b", "A": "B", "down": "up", **{"b": "a", "B": "A", "up": "down"}}
_ADAPTER = re.compile(
    r"hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|lora_mid|lora_magnitude_vector|dora_scale|oft_(r|R|blocks|diag)|boft_[Rs]|"
    r"ia3_l|vera_lambda_[bd]"
)

_Path = tuple[str, ...]
_Shapes = Mapping[_Path, tuple[int, ...]]


def not_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return name -> reason of those arrays that are no weights; parts of a name are separated by `/` or `.`."""
    paths = {name: tuple(re.split(r"[/.]", name)) for name in tensors}
    shapes = {path: tensors[name].shape for name, path in paths.items()}
    integers = {name for name, info in tensors.items() if info.shape == () and info.dtype.kind in "iu"}
    counted = {path[:-1] for name, path in paths.items() if path[-1] == "count" and name in integers}
    mirrors = _mirrors(shapes)
    adapter = UNMERGED if any("base_layer" in path for path in shapes) else ADAPTER
    found = {}
    for name, path in paths.items():
        reason = _by_path(path, counted, mirrors) or _follows(path, shapes) or _buffer(path, shapes[path])
        reason = reason or beside_weights(path, shapes) or (adapter if _is_of_adapter(name, path, tensors) else None)
        if reason is not None:
            found[name] = reason
    return found


def _by_path(path: _Path, counted: Iterable[_Path], mirrors: Mapping[_Path, str]) -> str | None:
    for end, part in enumerate(path, start=1):
        if part in _ALWAYS:
            return _ALWAYS[part]
        if path[:end] in mirrors:
            return mirrors[path[:end]]
        # At the root it would be the model's own.
        if end > 1 and part in _ADAM and path[: end - 1] in counted:
            return OPTIMISER
    return None


def _is_of_adapter(name: str, path: _Path, tensors: Mapping[str, TensorInfo]) -> bool:
    if match := _FACTOR.fullmatch(name):
        return f"{match[1]}{_OTHER_FACTOR[match[2]]}{match[3]}" in tensors
    return any(map(_ADAPTER.fullmatch, path))


def _follows(path: _Path, shapes: _Shapes) -> str | None:
    """Return what an array is that follows one array beside it, by its own name, or has its name below that one's."""
    shape = shapes[path]
    if len(path) > 1 and shapes.get(path[:-1]) == shape and path[-1] in _WHERE_MIRRORED:
        return _WHERE_MIRRORED[path[-1]]  # slots of TensorFlow: `kernel/Adam`
    leaf = path[-1] if path else ""
    if len(shape) < 2 or not _FOLLOWER.fullmatch(leaf):
        return None
    beside = (own for other, own in shapes.items() if other[: len(path) - 1] == path[:-1] and other != path)
    return AVERAGE if shape in beside else None


def _buffer(path: _Path, shape: tuple[int, ...]) -> str | None:
    """Return what a buffer is by its name: a mask, or a table that is computed, not learned."""
    leaf = path[-1]
    is_square = len(shape) > 1 and shape[-1] == shape[-2] and shape[:-2] == (1,) * (len(shape) - 2)
    if _MASK.fullmatch(leaf) or (len(shape) == 4 and leaf == "bias" and is_square):
        return MASK
    return TABLE if _TABLE.fullmatch(leaf) else None


def _mirrors(shapes: _Shapes) -> dict[_Path, str]:
    """Return path -> reason of subtrees that are named as copies and whose original is in the checkpoint."""
    inside: dict[_Path, list[_Path]] = {}
    for path in shapes:
        for end, part in enumerate(path[:-1], start=1):
            if part in _WHERE_MIRRORED:
                inside.setdefault(path[:end], []).append(path[end:])
    originals = {
        path: shape for path, shape in shapes.items() if not any(part in _WHERE_MIRRORED for part in path[:-1])
    }
    return {
        root: _WHERE_MIRRORED[root[-1]]
        for root, rests in inside.items()
        if _is_copy({rest: shapes[*root, *rest] for rest in rests}, originals)
    }


def _is_copy(copy: _Shapes, originals: _Shapes) -> bool:
    """Tell whether all arrays of a subtree are elsewhere too, under names that end alike, whatever separates parts."""
    arrays = {path: shape for path, shape in copy.items() if shape}  # counts and rates are of the copy alone
    if not arrays:
        return False
    if all(path[-1].isdecimal() for path in arrays):  # a list without names
        return Counter(arrays.values()) <= Counter(originals.values())
    is_wrapped = all(path[0] in _WRAPPERS for path in arrays)
    names = {"".join(path[is_wrapped:]): shape for path, shape in arrays.items()}
    first, joined = next(iter(names)), {"".join(path): shape for path, shape in originals.items()}
    prefixes = {"".join(path[:end]) for path in originals for end in range(len(path)) if "".join(path[end:]) == first}
    return any(all(joined.get(prefix + name) == shape for name, shape in names.items()) for prefix in prefixes)
