"""GGUF files as weights: dequantised to float32, under Hugging Face names where the architecture is known.

>>> hugging_face_names("llama", ["blk.3.attn_q.weight", "output.weight"], "model.gguf")
{'model.layers.3.self_attn.q_proj.weight': 'blk.3.attn_q.weight', 'lm_head.weight': 'output.weight'}
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax._axes import LeafAxes
from farms_jax._torch_axes import torch
from farms_jax.errors import InputError, listed, printable, short_repr
from farms_jax.weights.conversion import Row, Table
from farms_jax.weights.gguf_file import quantisation_of, read_gguf, read_tensor
from farms_jax.weights.reading import DOWNLOAD_AGAIN, TensorInfo, part_of
from farms_jax.weights.source import WeightSource

ROPE_FACTORS = "rope_freqs.weight"
_FLOAT32 = np.dtype(np.float32)
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
    rows = [Row(f"{n}.{kind}", f"{path}.{kind}") for n, path in modules.items() for kind in ("weight", "bias")]
    return Table([*rows, Row(ROPE_FACTORS, ROPE_FACTORS)])


_TABLES = {"llama": _table(_BLOCK), "qwen2": _table(_BLOCK), "qwen3": _table(_BLOCK | _HEAD_NORMS)}


class GGUFSource(WeightSource):
    """Weights in one GGUF file, of any architecture; `metadata` lacks long arrays."""

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        """Read the metadata; where a tensor has no Hugging Face name, all keep theirs, or an error if `strict`."""
        self._file = read_gguf(path)
        self.metadata, found = self._file.metadata, self._file.tensors
        try:
            self._names = hugging_face_names(architecture_of(self.metadata, str(path)), found, str(path))
        except InputError:
            if strict:
                raise
            self._names = {name: name for name in found}
        shapes = {name: found[own_name].shape for name, own_name in self._names.items()}
        self._heads = _interleaved_heads(self.metadata, shapes, str(path))
        tensors = {name: TensorInfo(found[own_name].dtype, shapes[name]) for name, own_name in self._names.items()}
        unread = {name: fault for name, own_name in self._names.items() if (fault := found[own_name].fault)}
        if strict and unread:
            name, fault = next(iter(unread.items()))
            raise InputError(f"{path}: {name}: {fault}; give a file in F16, F32 or Q8_0")
        # How each is stored: F32, F16, BF16, or a quantisation such as Q8_0.
        self.kinds = {name: found[own_name].kind.name for name, own_name in self._names.items() if name not in unread}
        told = quantisation_of(self._file)
        super().__init__(path, path.stem, "gguf", torch, tensors, unread=unread, quantisation=told)

    def _read(self, name: str) -> np.ndarray:
        array = read_tensor(self._file, self._names[name])
        if name not in self._heads:
            return array
        # Rows (i, half) of each head go in the order (half, i).
        heads = self._heads[name]
        split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        part = None if name in self._heads else part_of(self.tensors[name].shape, axes, index)
        return None if part is None else read_tensor(self._file, self._names[name], *part)


def architecture_of(metadata: Mapping[str, Any], where: str) -> str:
    """Return a file's architecture: llama (also for Mistral and SmolLM), qwen2 or qwen3; another is an InputError."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _TABLES:
        raise InputError(f"{where}: unknown architecture {short_repr(architecture)}; known are {', '.join(_TABLES)}")
    return architecture


def hugging_face_names(architecture: str, names: Iterable[str], where: str) -> dict[str, str]:
    """Return Hugging Face name -> name in the file; an InputError lists unknown names."""
    rows = {name: _TABLES[architecture].by_name(name) for name in names}
    if unknown := [printable(name) for name, row in rows.items() if row is None]:
        raise InputError(
            f"{where}: unknown tensors for {architecture}: {listed(unknown)}; give the model as a Hugging Face folder"
        )
    return {str(row.path): name for name, row in rows.items() if row}


def _interleaved_heads(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, int]:
    """Return the projections whose rows the file has interleaved, Hugging Face name -> number of heads.

    llama.cpp's converter interleaves queries and keys of the llama architecture alone.

    Raises:
        InputError: The rows are not a whole number of heads.
    """
    if metadata.get("general.architecture") != "llama":
        return {}
    heads = metadata.get("llama.attention.head_count")
    few = metadata.get("llama.attention.head_count_kv", heads)
    # By both names: those of a mixture of experts stay as they are.
    counts = {"q_proj": heads, "k_proj": few, "attn_q": heads, "attn_k": few}
    # Without a usable count rows stay as they are: fine for a diagnosis, and pruning refuses the file for its config.
    known = {m: n for m, count in counts.items() if type(n := same_in_all_blocks(count)) is int and n > 0}
    found = {name: known[module] for name in shapes if (module := name.split(".")[-2:][0]) in known}
    for name, count in found.items():
        if shapes[name][0] % (2 * count):
            raise InputError(
                f"{where}: {name} has {shapes[name][0]} rows, which {count} heads of two halves do not divide; "
                f"{DOWNLOAD_AGAIN}"
            )
    return found


def same_in_all_blocks(value: Any) -> Any:
    """Return the one value of a list that has it for every block; any other value as it is."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value
