"""One language model's weights as several frameworks lay them out, with the name of every layer in each.

The weights come under Hugging Face's names, `model.layers.0.self_attn.q_proj.weight` (outputs, inputs). Each function
returns the parameters, and from the names that an analysis of them gives to those of Hugging Face.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

_HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_MLP = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a LLaMA without its embeddings.

    Attributes:
        tensors: by Hugging Face's names.
        layers: number of blocks.
        head_size: size of a head.
    """

    tensors: Mapping[str, np.ndarray]
    layers: int
    head_size: int

    def name(self, block: int, part: str) -> str:
        """Return Hugging Face's name of a projection."""
        parent = "self_attn" if part in {*_HEADS.values(), "o_proj"} else "mlp"
        return f"model.layers.{block}.{parent}.{part}.weight"

    def kernel(self, block: int, part: str) -> np.ndarray:
        """Return a projection as (inputs, outputs)."""
        return np.asarray(self.tensors[self.name(block, part)]).T

    def by_heads(self, block: int, part: str) -> np.ndarray:
        """Return a projection of the attention as (inputs, heads, size), or `o_proj` as (heads, size, outputs)."""
        kernel = self.kernel(block, part)
        if part == "o_proj":
            return kernel.reshape(-1, self.head_size, kernel.shape[1])
        return kernel.reshape(kernel.shape[0], -1, self.head_size)


def flax_blocks(weights: Weights) -> tuple[Any, dict[str, str]]:
    """Lay out as Flax modules, one for each block."""
    params, names = {}, {}
    for i in range(weights.layers):
        attention = {ours: {"kernel": weights.by_heads(i, theirs)} for ours, theirs in _HEADS.items()}
        attention["out"] = {"kernel": weights.by_heads(i, "o_proj")}
        mlp = {ours: {"kernel": weights.kernel(i, theirs)} for ours, theirs in _MLP.items()}
        params[f"block_{i}"] = {"attention": attention, "mlp": mlp}
        names |= {f"block_{i}/attention/{ours}/kernel": weights.name(i, theirs) for ours, theirs in _HEADS.items()}
        names[f"block_{i}/attention/out/kernel"] = weights.name(i, "o_proj")
        names |= {f"block_{i}/mlp/{ours}/kernel": weights.name(i, theirs) for ours, theirs in _MLP.items()}
    return params, names


def maxtext(weights: Weights, scan_axis: int = 1) -> tuple[Any, dict[str, str]]:
    """Lay out as MaxText's scanned decoder: one leaf for all blocks."""

    def stacked(kernels: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {"kernel": np.stack(kernels, axis=scan_axis)}

    blocks = range(weights.layers)
    attention = {ours: stacked([weights.by_heads(i, theirs) for i in blocks]) for ours, theirs in _HEADS.items()}
    attention["out"] = stacked([weights.by_heads(i, "o_proj") for i in blocks])
    mlp = {ours: stacked([weights.kernel(i, theirs) for i in blocks]) for ours, theirs in _MLP.items()}
    names = {}
    for i in blocks:
        for ours, theirs in {**_HEADS, "out": "o_proj"}.items():
            names[f"decoder/layers/self_attention/{ours}/kernel[{i}]"] = weights.name(i, theirs)
        for ours, theirs in _MLP.items():
            names[f"decoder/layers/mlp/{ours}/kernel[{i}]"] = weights.name(i, theirs)
    return {"decoder": {"layers": {"self_attention": attention, "mlp": mlp}}}, names


def tunix(weights: Weights) -> tuple[Any, dict[str, str]]:
    """Lay out as Tunix's Gemma: einsum kernels, keys and values in one leaf."""
    layers, names = {}, {}
    for i in range(weights.layers):
        by_heads = {part: weights.by_heads(i, part).transpose(1, 0, 2) for part in _HEADS.values()}
        attention = {
            "q_einsum": {"w": by_heads["q_proj"]},
            "kv_einsum": {"w": np.stack([by_heads["k_proj"], by_heads["v_proj"]])},
            "attn_vec_einsum": {"w": weights.by_heads(i, "o_proj")},
        }
        mlp = {part: {"kernel": weights.kernel(i, part)} for part in _MLP.values()}
        layers[str(i)] = {"attn": attention, "mlp": mlp}
        names |= {f"layers/{i}/mlp/{part}/kernel": weights.name(i, part) for part in _MLP.values()}
        names |= {
            f"layers/{i}/attn/q_einsum/w": weights.name(i, "q_proj"),
            f"layers/{i}/attn/kv_einsum/w[0]": weights.name(i, "k_proj"),
            f"layers/{i}/attn/kv_einsum/w[1]": weights.name(i, "v_proj"),
            f"layers/{i}/attn/attn_vec_einsum/w": weights.name(i, "o_proj"),
        }
    return {"layers": layers}, names
