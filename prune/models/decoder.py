"""The decoder of most families: attention and a feed-forward network around skips; a switch for each difference."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from .network import Inputs, Network, PartKind, Shape
from .operations import ACTIVATIONS, State, attend, cap, embedding, layer_norm, linear, linear_shapes, rms_norm
from .rope import Rope, rotate


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint calls the modules of a block and the final norm; a norm without a name is not there."""

    attention: str = "self_attn"
    query_key_value: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # in attention: three linears, or one for all
    attention_out: str = "o_proj"  # in attention
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # with a gate: two linears, or one for both; without: one
    down: str = "mlp.down_proj"
    pre_attention_norm: str = "input_layernorm"
    post_attention_norm: str = ""  # of the output, before the skip
    pre_mlp_norm: str = "post_attention_layernorm"
    post_mlp_norm: str = ""
    final_norm: str = "norm"


LLAMA = Names()


@dataclass(frozen=True, kw_only=True)
class Decoder(Network):
    """A decoder network."""

    modules: Names
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    epsilon: float  # of the norms
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # that is added to the weights of RMS norms
    gated: bool = True  # the feed-forward network has a gate
    parallel: bool = False  # attention and feed-forward network have the same input, normed once or each
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "all"] = ""  # RMS norm of query and key: over each head's features, or over all
    # Rows of one linear for query, key and value: "grouped" has the queries, key and value of each key head together.
    fused: Literal["stacked", "grouped"] = "stacked"
    ropes: tuple[Rope, ...] = ()  # that blocks have; none where positions are learned
    block_ropes: tuple[int, ...] = ()  # per block, which of them
    windows: tuple[int | None, ...]  # per block, positions that a query sees; None: all before it
    scales: tuple[float, ...] = ()  # per block, of the attention's scores, where it is not 1 / sqrt(head_dim)
    embedding_scale: float = 1.0
    attention_limit: float | None = None  # see `cap`, of the attention's scores
    logit_limit: float | None = None

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears of a block by shared input, in the reference's order."""
        return self._query_key_value, (self._attention_out,), self.modules.up, (self.modules.down,)

    @property
    def _query_key_value(self) -> tuple[str, ...]:
        return tuple(f"{self.modules.attention}.{name}" for name in self.modules.query_key_value)

    @property
    def _attention_out(self) -> str:
        return f"{self.modules.attention}.{self.modules.attention_out}"

    def _shapes(self, kind: PartKind) -> dict[str, Shape]:
        size, modules = self.hidden_size, self.modules
        if kind == "embed":
            shapes: dict[str, Shape] = {f"{self.token_table}.weight": (self.vocab_size, size)}
            return shapes if self.ropes else shapes | {f"{self.position_table}.weight": (self.max_length, size)}
        if kind == "head":
            return {**self._norm_shapes(modules.final_norm), **self.head_shapes(size)}
        shapes = {}
        norms = (modules.pre_attention_norm, modules.post_attention_norm, modules.pre_mlp_norm, modules.post_mlp_norm)
        for name in norms:
            shapes |= self._norm_shapes(name)
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for letter, count in (("q", heads), ("k", kv_heads)):
            if self.qk_norm:
                features = self.head_dim if self.qk_norm == "head" else count
                shapes[f"{modules.attention}.{letter}_norm.weight"] = (features,)
        for outputs, linears in (((heads, kv_heads, kv_heads), self._query_key_value), (self._inner, modules.up)):
            bias = self.mlp_bias if linears == modules.up else self.qkv_bias
            rows = outputs if len(linears) == len(outputs) else (sum(outputs),)
            for name, count in zip(linears, rows, strict=True):
                shapes |= linear_shapes(name, count, size, bias)
        shapes |= linear_shapes(self._attention_out, size, heads, self.o_bias)
        return shapes | linear_shapes(modules.down, size, self.intermediate_size, self.mlp_bias)

    @property
    def _inner(self) -> tuple[int, ...]:
        return (self.intermediate_size,) * (2 if self.gated else 1)

    def _norm_shapes(self, name: str) -> dict[str, Shape]:
        kinds = ("weight", "bias") if self.norm == "layer" else ("weight",)
        return {f"{name}.{kind}": (self.hidden_size,) for kind in kinds} if name else {}

    def _block_constants(self, block: int) -> dict[str, float]:
        """Return the numbers in which blocks differ, where they do.

        In the state, not in the code, so that one compilation serves all blocks.
        """
        constants, modules = {}, self.modules
        if any(self.windows):
            window = self.windows[block]
            constants[f"{modules.attention}.window"] = float("inf") if window is None else window
        if len(self.ropes) > 1:
            constants[f"{modules.attention}.rope"] = self.block_ropes[block]
        if self.scales:
            constants[f"{modules.attention}.scale"] = self.scales[block]
        return constants

    def _embed(self, state: State, ids: Array) -> Array:
        x = embedding(state, self.token_table, ids)
        if not self.ropes:
            x = x + embedding(state, self.position_table, jnp.arange(ids.shape[1]))[None]
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def _block(self, state: State, x: Array) -> tuple[Array, Inputs]:
        modules = self.modules
        attention_input = self._norm(state, modules.pre_attention_norm, x)
        heads = self._attention(state, attention_input)
        attended = self._norm(state, modules.post_attention_norm, linear(state, self._attention_out, heads))
        source = x if self.parallel else x + attended
        if self.parallel and not modules.pre_mlp_norm:
            mlp_input = attention_input
        else:
            mlp_input = self._norm(state, modules.pre_mlp_norm, source)
        active = self._active(state, mlp_input)
        fed = self._norm(state, modules.post_mlp_norm, linear(state, modules.down, active))
        y = source + attended + fed if self.parallel else source + fed
        return y, (attention_input, heads, mlp_input, active)

    def _norm(self, state: State, name: str, x: Array) -> Array:
        if not name:
            return x
        if self.norm == "layer":
            return layer_norm(state, name, x, self.epsilon)
        return rms_norm(state, name, x, self.epsilon, self.norm_offset)

    def _active(self, state: State, x: Array) -> Array:
        """Return the input of the last linear of the feed-forward network, (B, T, inner), for x (B, T, D)."""
        activation, parts = ACTIVATIONS[self.activation], [linear(state, name, x) for name in self.modules.up]
        if not self.gated:
            return activation(parts[0])
        gate, up = parts if len(parts) == 2 else jnp.split(parts[0], 2, axis=-1)
        return activation(gate) * up

    def _attention(self, state: State, x: Array) -> Array:
        """Return the heads' outputs side by side, (B, T, heads * head_dim), for x (B, T, D)."""
        own = self.modules.attention
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim)
        query, key, value = self._query_key_and_value(state, x)
        if self.qk_norm == "all":
            query, key = (self._norm(state, f"{own}.{n}_norm", y) for n, y in (("q", query), ("k", key)))
        query = query.reshape(*x.shape[:2], *groups)
        key, value = (y.reshape(*x.shape[:2], self.num_kv_heads, self.head_dim) for y in (key, value))
        if self.qk_norm == "head":
            query, key = (self._norm(state, f"{own}.{n}_norm", y) for n, y in (("q", query), ("k", key)))
        if self.ropes:
            query, key = (rotate(y, self.ropes, state.get(f"{own}.rope")) for y in (query, key))
        window, scale = state.get(f"{own}.window"), state.get(f"{own}.scale")
        return attend(query, key, value, window, scale, self.attention_limit)

    def _query_key_and_value(self, state: State, x: Array) -> list[Array]:
        """Return them as (B, T, heads * head_dim), or in any shape of as many numbers."""
        parts = [linear(state, name, x) for name in self._query_key_value]
        if len(parts) == 3:
            return parts
        group = self.num_heads // self.num_kv_heads
        if self.fused == "grouped":
            by_group = parts[0].reshape(*x.shape[:2], self.num_kv_heads, group + 2, self.head_dim)
            return jnp.split(by_group, [group, group + 1], axis=3)
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return jnp.split(parts[0], [heads, heads + kv_heads], axis=-1)

    def _head(self, state: State, x: Array) -> Array:
        return cap(self.unembed(state, self._norm(state, self.modules.final_norm, x)), self.logit_limit)
