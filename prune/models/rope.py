"""Rotary position embedding: pairs of features of each head, turned by an angle that grows with the position.

References:
    Su et al., RoFormer, arXiv:2104.09864; the `linear` scaling: Chen et al., arXiv:2306.15595; `llama3`: the LLaMA 3.1
    release, https://github.com/meta-llama/llama-models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from farms_jax.errors import InputError

from .fields import Fields

TYPES = ("default", "linear", "llama3")
THETA = 10000.0  # RoFormer's base, and the default of every family here


@dataclass(frozen=True)
class Rope:
    """The frequencies of a model."""

    theta: float = THETA
    kind: str = "default"  # one of TYPES
    factor: float = 1.0  # linear: positions are divided by it; llama3: those of the low frequencies
    low_freq_factor: float = 1.0  # llama3: periods longer than original_length / this are low frequencies
    high_freq_factor: float = 4.0  # llama3: periods shorter than original_length / this stay as they are
    original_length: int = 8192  # llama3: positions before the context was extended

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return the angle per position of each pair of features, float32 (head_dim / 2,), descending."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (1 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind == "llama3":
            turns = self.original_length * frequencies / np.float32(2 * math.pi)  # in the original context
            # 0 for low frequencies, 1 for high ones, linear in the number of turns between.
            share = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
            return ((1 - share) * frequencies / self.factor + share * frequencies).astype(np.float32)
        return frequencies


def read_rope(config: Fields, max_length: int) -> Rope:
    """Return the frequencies of a config.json: in `rope_parameters` today, earlier in `rope_theta` and `rope_scaling`.

    `max_length`, the positions of the model, stands in for those before the context was extended if they are left out.

    Raises:
        InputError: the type is not one of TYPES, or fields are missing or wrong.
    """
    scaling = config.table("rope_scaling") or config.table("rope_parameters") or Fields({})
    for fields in (config, scaling):
        fields.raise_if_set("partial_rotary_factor", "rotation of a part of the features is not supported", harmless=1)
    if any(isinstance(value, Mapping) for value in scaling.content.values()):
        raise InputError(f"{scaling.where}: one rotation for each type of layer is not supported; known: one for all")
    theta = scaling.number("rope_theta", config.number("rope_theta", THETA))
    kind = scaling.choice("rope_type" if "rope_type" in scaling else "type", TYPES, "default")
    if kind == "default":
        return Rope(theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"above `low_freq_factor` ({low})", high)
    # A length beside `max_position_embeddings` counts first, one in the object second.
    length = scaling.size("original_max_position_embeddings", max_length)
    return Rope(theta, kind, factor, low, high, config.size("original_max_position_embeddings", length))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Turn each head's features by their position: x (B, T, ..., H), where feature i is paired with i + H / 2."""
    positions = np.arange(x.shape[1], dtype=np.float32)
    # In NumPy, so that they are constants, and float32 products, whatever the backend.
    angles = positions[:, None] * rope.frequencies(x.shape[-1])
    shape = (x.shape[1], *(1,) * (x.ndim - 3), angles.shape[1])
    cos, sin = jnp.asarray(np.cos(angles).reshape(shape)), jnp.asarray(np.sin(angles).reshape(shape))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
