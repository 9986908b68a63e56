"""GGUF's names of tensors and order of rows, as those of Hugging Face.

>>> hugging_face_names("llama", ["blk.3.attn_q.weight", "output.weight"], "model.gguf")
{'model.layers.3.self_attn.q_proj.weight': 'blk.3.attn_q.weight', 'lm_head.weight': 'output.weight'}
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.conversion import Row, Table, listed
from farms_jax.weights.reading import DOWNLOAD_AGAIN
from farms_jax.weights.sanitise import printable, short_repr

ROPE_FACTORS = "rope_freqs.weight"
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


def _table(in_block: Mapping[str, str]) -> Table:
    modules = _ENDS | {f"blk.{{}}.{name}": f"model.layers.{{}}.{module}" for name, module in in_block.items()}
    return Table(Row(f"{n}.{kind}", f"{path}.{kind}") for n, path in modules.items() for kind in ("weight", "bias"))


_TABLES = {"llama": _table(_BLOCK), "qwen2": _table(_BLOCK), "qwen3": _table(_BLOCK | _HEAD_NORMS)}


def architecture_of(metadata: Mapping[str, Any], where: str) -> str:
    """Return a file's architecture.

    Args:
        metadata: Metadata of the file.
        where: Name of the file, for messages.

    Returns:
        llama (which is also Mistral and SmolLM), qwen2 or qwen3.

    Raises:
        InputError: The file has another one.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _TABLES:
        raise InputError(f"{where}: unknown architecture {short_repr(architecture)}; known are {', '.join(_TABLES)}")
    return architecture


def hugging_face_names(architecture: str, names: Iterable[str], where: str) -> dict[str, str]:
    """Translate names of tensors.

    Args:
        architecture: Architecture of the file.
        names: Names of its tensors.
        where: Name of the file, for messages.

    Returns:
        Hugging Face name -> name in the file, without the rotary factors.

    Raises:
        InputError: There are names that are in no table; all in one error.
    """
    rows = {name: _TABLES[architecture].by_name(name) for name in names if name != ROPE_FACTORS}
    if unknown := [printable(name) for name, row in rows.items() if row is None]:
        raise InputError(
            f"{where}: unknown tensors for {architecture}: {listed(unknown)}; give the model as a Hugging Face folder"
        )
    return {str(row.path): name for name, row in rows.items() if row}


def heads_of(
    architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, int]:
    """Find the tensors whose rows the file has interleaved, with their number of heads.

    Args:
        architecture: Architecture of the file; llama.cpp's converter interleaves rows for llama alone.
        metadata: Metadata of the file.
        shapes: Hugging Face name -> shape.
        where: Name of the file, for messages.

    Returns:
        Hugging Face names of query and key projections -> heads; for `restore_rows`.

    Raises:
        InputError: Rows are no whole number of heads.
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
                f"{DOWNLOAD_AGAIN}"
            )
    return found


def restore_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Give the rows of a query or key projection their order in Hugging Face's files.

    GGUF files of the llama architecture have the two halves of a head interleaved: rows (half, i) -> (i, half).

    Args:
        array: Weight (heads * head_dim, in) or bias (heads * head_dim,).
        heads: Number of query or key heads.

    Returns:
        The same rows, in each head first those of the first half.
    """
    split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)
