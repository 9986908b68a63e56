"""Rotary position embedding: pairs of features of each head, turned by an angle that grows with the position.

References:
    Su et al., RoFormer, arXiv:2104.09864. Longer contexts: `linear`, Chen et al., arXiv:2306.15595; `dynamic`, the base
    grows with the sequence, and `yarn`, Peng et al., arXiv:2309.00071; `longrope`, Ding et al., arXiv:2402.13753;
    `llama3`: the LLaMA 3.1 release, https://github.com/meta-llama/llama-models.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from farms_jax.errors import InputError

from .fields import Fields

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
THETA = 10000.0  # RoFormer's base, and the default of most families


@dataclass(frozen=True)
class Rope:
    """The frequencies of a model, or of some of its blocks."""

    theta: float = THETA
    kind: str = "default"  # one of TYPES, or "none": nothing is turned
    factor: float = 1.0  # linear: positions are divided by it; llama3, yarn: those of low frequencies
    low_freq_factor: float = 1.0  # llama3, yarn: periods longer than original_length / this are low frequencies
    high_freq_factor: float = 4.0  # llama3, yarn: periods shorter than original_length / this stay as they are
    original_length: int = 8192  # positions before the context was extended
    share: float = 1.0  # of each head's features that are turned, the first ones
    scale: float = 1.0  # yarn, longrope: of the turned features
    whole: bool = True  # yarn: the limits between the frequencies are whole pairs
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies of sequences up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: and of longer ones

    def features(self, head_dim: int) -> int:
        """Return how many of a head's features are turned."""
        return int(head_dim * self.share)

    def frequencies(self, head_dim: int, length: int = 1) -> np.ndarray:
        """Return the angle per position of each pair of features, float32 (features / 2,), descending.

        Those of `dynamic` and `longrope` depend on the length of the sequence.
        """
        count = self.features(head_dim)
        if self.kind == "none":
            return np.zeros(count // 2, np.float32)
        exponents = np.arange(0, count, 2, dtype=np.float32) / np.float32(count)
        theta = self.theta
        if self.kind == "dynamic":
            growth = self.factor * max(length / self.original_length, 1) - (self.factor - 1)
            theta *= growth ** (count / (count - 2))
        frequencies = (1 / np.float32(theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind == "longrope":
            factors = self.long_factors if length > self.original_length else self.short_factors
            return (frequencies / np.array(factors, np.float32)).astype(np.float32)
        if self.kind in {"llama3", "yarn"}:
            share = self._unscaled(frequencies, count)
            return ((1 - share) * frequencies / self.factor + share * frequencies).astype(np.float32)
        return frequencies

    def _unscaled(self, frequencies: np.ndarray, count: int) -> np.ndarray:
        """Return 0 for low frequencies, 1 for high ones, and what is between."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3":  # linear in the number of turns in the original context
            turns = self.original_length * frequencies / np.float32(2 * math.pi)
            return np.clip((turns - low) / (high - low), 0, 1)
        # Linear in the number of the pair, from that with `high` turns to that with `low` turns.
        limits = [
            count * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (high, low)
        ]
        first, last = (math.floor(limits[0]), math.ceil(limits[1])) if self.whole else limits
        first, last = max(first, 0), min(last, count - 1)
        ramp = (np.arange(count // 2, dtype=np.float32) - first) / (last - first or 0.001)
        return 1 - np.clip(ramp, 0, 1)

    def tables(self, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines of the angles at each position, float32 (length, features / 2)."""
        positions = np.arange(length, dtype=np.float32)
        # In NumPy, so that they are constants, and float32 products, whatever the backend.
        angles = positions[:, None] * self.frequencies(head_dim, length)
        return np.cos(angles) * np.float32(self.scale), np.sin(angles) * np.float32(self.scale)


def read_rope(config: Fields, max_length: int, default: Rope, share: str | None = None) -> Rope:
    """Return the frequencies of a config.json: in `rope_parameters` today, earlier in `rope_theta` and `rope_scaling`.

    `max_length`, the positions of the model, stands in for those before the context was extended if they are left out;
    `default` has the base and the share of turned features that do; `share` is the field for it, if the family has one.

    Raises:
        InputError: the type is not one of TYPES, or fields are missing or wrong.
    """
    scaling = config.table("rope_scaling") or config.table("rope_parameters") or Fields({})
    if any(isinstance(value, Mapping) for value in scaling.content.values()):
        raise InputError(f"{scaling.where}: one rotation for each type of layer is not supported; known: one for all")
    if share is None:
        for fields in (config, scaling):
            why = "this family turns all features of a head"
            fields.raise_if_set("partial_rotary_factor", why, harmless=1)
    else:
        part = scaling.number("partial_rotary_factor", config.number(share, default.share))
        if part > 1:
            raise config.error(share, "at most 1", part)
        default = dataclasses.replace(default, share=part)
    theta = scaling.number("rope_theta", config.number("rope_theta", default.theta))
    return make_rope(scaling, dataclasses.replace(default, theta=theta), config, max_length)


def make_rope(scaling: Fields, plain: Rope, config: Fields, max_length: int) -> Rope:
    """Return frequencies with the scaling of an object in a config.json, from those without."""
    kind = scaling.choice("rope_type" if "rope_type" in scaling else "type", TYPES, "default")
    if kind == "default":
        return plain
    if kind in {"linear", "dynamic"}:
        return dataclasses.replace(plain, kind=kind, factor=scaling.number("factor"), original_length=max_length)
    # A length beside `max_position_embeddings` counts first, one in the object second.
    length = scaling.size("original_max_position_embeddings", max_length)
    length = config.size("original_max_position_embeddings", length)
    rope = dataclasses.replace(plain, kind=kind, original_length=length)
    if kind == "longrope":
        return _longrope(scaling, rope, max_length)
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    defaults = (None, None) if kind == "llama3" else (1.0, 32.0)
    low, high = (scaling.number(name, value) for name, value in zip(names, defaults, strict=True))
    if high <= low:
        raise scaling.error(names[1], f"above `{names[0]}` ({low})", high)
    rope = dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)
    if kind == "llama3":
        return dataclasses.replace(rope, factor=scaling.number("factor"))
    factor = scaling.number("factor", max_length / length)
    return dataclasses.replace(
        rope, factor=factor, scale=_yarn_scale(scaling, factor), whole=scaling.flag("truncate", True)
    )


def _yarn_scale(scaling: Fields, factor: float) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        scale = grown(scaling.number("mscale")) / grown(scaling.number("mscale_all_dim"))
    else:
        scale = grown(1.0)
    return scaling.number("attention_factor", scale)


def _longrope(scaling: Fields, rope: Rope, max_length: int) -> Rope:
    factor = scaling.number("factor", max_length / rope.original_length)
    if rope.original_length < 2:
        raise scaling.error("original_max_position_embeddings", "2 or more", rope.original_length)
    scale = math.sqrt(1 + math.log(factor) / math.log(rope.original_length)) if factor > 1 else 1.0
    short, long = (scaling.numbers(f"{name}_factor") for name in ("short", "long"))
    scale = scaling.number("attention_factor", scale)
    return dataclasses.replace(rope, factor=factor, scale=scale, short_factors=short, long_factors=long)


def rotate(x: jax.Array, ropes: tuple[Rope, ...], which: jax.Array | None = None) -> jax.Array:
    """Return heads x (B, T, ..., H) with features turned by their position, i paired with i + turned / 2.

    `which` of the `ropes`, a scalar, counts; without it the first. All turn the same number of features.
    """
    tables = [rope.tables(x.shape[-1], x.shape[1]) for rope in ropes]
    shape = (x.shape[1], *(1,) * (x.ndim - 3), tables[0][0].shape[1])
    cos, sin = (jnp.asarray(np.stack(table).reshape(-1, *shape)) for table in zip(*tables, strict=True))
    index = 0 if which is None else which.astype(jnp.int32)
    cos, sin = cos[index], sin[index]
    turned = ropes[0].features(x.shape[-1])
    first, second = jnp.split(x[..., :turned], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*parts, x[..., turned:]] if turned < x.shape[-1] else parts, axis=-1)
