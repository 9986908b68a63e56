"""From GGUF to Hugging Face: names of tensors and the order of rows.

>>> hugging_face_names("llama", ["blk.3.attn_q.weight", "output.weight"], "model.gguf")
{'model.layers.3.self_attn.q_proj.weight': 'blk.3.attn_q.weight', 'lm_head.weight': 'output.weight'}
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.sanitise import printable, short_repr

ROPE_FACTORS = "rope_freqs.weight"
_NAME = re.compile(r"(?:blk\.(?P<block>0|[1-9]\d*)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BLOCKS = {"llama": _BLOCK, "qwen2": _BLOCK, "qwen3": _BLOCK | _HEAD_NORMS}


def architecture_of(metadata: Mapping[str, Any], where: str) -> str:
    """Return a file's architecture.

    Args:
        metadata: of the file.
        where: the file's name, for messages.

    Returns:
        llama (which is also Mistral and SmolLM), qwen2 or qwen3.

    Raises:
        InputError: another one.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _BLOCKS:
        raise InputError(f"{where}: unknown architecture {short_repr(architecture)}; known are {', '.join(_BLOCKS)}")
    return architecture


def hugging_face_names(architecture: str, names: Iterable[str], where: str) -> dict[str, str]:
    """Translate names of tensors.

    Args:
        architecture: of the file.
        names: of its tensors.
        where: the file's name, for messages.

    Returns:
        Hugging Face name -> name in the file, without the rotary factors.

    Raises:
        InputError: names that are in no table, all in one error.
    """
    found, unknown = {}, []
    for name in names:
        if name == ROPE_FACTORS:
            continue
        match = _NAME.fullmatch(name)
        table = {} if match is None else _ENDS if match["block"] is None else _BLOCKS[architecture]
        if match is None or match["module"] not in table:
            unknown.append(name)
            continue
        prefix = "" if match["block"] is None else f"model.layers.{match['block']}."
        found[f"{prefix}{table[match['module']]}.{match['kind']}"] = name
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise InputError(
            f"{where}: unknown tensors for {architecture}: {', '.join(map(printable, unknown[:10]))}{more}; "
            "give the model as a Hugging Face folder"
        )
    return found


def heads_of(
    architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, int]:
    """Find the tensors whose rows the file has interleaved, with their number of heads.

    Args:
        architecture: of the file; the converter does so for llama alone.
        metadata: of the file.
        shapes: Hugging Face name -> shape.
        where: the file's name, for messages.

    Returns:
        Hugging Face names of query and key projections -> heads; for `restore_rows`.

    Raises:
        InputError: rows are no whole number of heads.
    """
    heads = metadata.get("llama.attention.head_count")
    keys = metadata.get("llama.attention.head_count_kv", heads)
    counts = {"q_proj": heads, "k_proj": keys} if architecture == "llama" else {}
    known = {module: count for module, count in counts.items() if type(count) is int and count > 0}
    found = {name: known[module] for name in shapes if (module := name.split(".")[-2:][0]) in known}
    for name, count in found.items():
        if shapes[name][0] % (2 * count):
            raise InputError(
                f"{where}: {name} has {shapes[name][0]} rows, which {count} heads of two halves do not divide; "
                "download it again"
            )
    return found


def restore_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Give the rows of a query or key projection their order in Hugging Face's files.

    GGUF files of the llama architecture have the two halves of a head interleaved: rows (half, i) -> (i, half).

    Args:
        array: weight (heads * head_dim, in) or bias (heads * head_dim,).
        heads: query or key heads.

    Returns:
        The same rows, in each head first those of the first half.
    """
    split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)
