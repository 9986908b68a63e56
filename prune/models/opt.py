"""OPT, 125M to 66B; the 350M differs: norms behind the skips, embeddings of half the width, no final norm.

References:
    Zhang et al., OPT, arXiv:2205.01068. Defaults of fields that a config.json leaves out: `transformers` 5.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from .fields import MOST_BLOCKS, Fields
from .network import Inputs, Network, PartKind, Shape
from .operations import ACTIVATIONS, State, attend, embedding, layer_norm, linear, linear_shapes

OFFSET = 2  # rows of the position embedding before the first position's, which the original kept for padding
EPSILON = 1e-5  # of the norms


@dataclass(frozen=True, kw_only=True)
class OPT(Network):
    """A network of the OPT family."""

    embedding_size: int  # of the tokens; projected to hidden_size if it is another
    ffn_size: int
    num_heads: int
    activation: str
    pre_norm: bool  # norms before attention and feed-forward network, else behind the skips
    final_norm: bool
    bias: bool  # of a block's linears
    affine: bool  # norms have scale and bias

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears of a block by shared input, in the reference's order."""
        attention = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")
        return (attention, ("self_attn.out_proj",), ("fc1",), ("fc2",))

    def _shapes(self, kind: PartKind) -> dict[str, Shape]:
        size, inner = self.hidden_size, self.embedding_size
        projects = inner != size
        if kind == "embed":
            tokens, positions = (self.vocab_size, inner), (self.max_length + OFFSET, size)
            project_in = linear_shapes("project_in", size, inner, bias=False) if projects else {}
            return {"embed_tokens.weight": tokens, "embed_positions.weight": positions, **project_in}
        if kind == "head":
            norm = self._norm_shapes("final_layer_norm") if self.final_norm else {}
            project_out = linear_shapes("project_out", inner, size, bias=False) if projects else {}
            return {**norm, **project_out, **self.head_shapes(inner)}
        shapes = self._norm_shapes("self_attn_layer_norm") | self._norm_shapes("final_layer_norm")
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear_shapes(f"self_attn.{name}", size, size, self.bias)
        shapes |= linear_shapes("fc1", self.ffn_size, size, self.bias)
        return shapes | linear_shapes("fc2", size, self.ffn_size, self.bias)

    def _norm_shapes(self, name: str) -> dict[str, Shape]:
        return {f"{name}.{kind}": (self.hidden_size,) for kind in ("weight", "bias")} if self.affine else {}

    def _embed(self, state: State, ids: Array) -> Array:
        tokens = embedding(state, "embed_tokens", ids)
        if self.embedding_size != self.hidden_size:
            tokens = linear(state, "project_in", tokens)
        return tokens + embedding(state, "embed_positions", jnp.arange(ids.shape[1]) + OFFSET)[None]

    def _block(self, state: State, x: Array) -> tuple[Array, Inputs]:
        attention_input = layer_norm(state, "self_attn_layer_norm", x, EPSILON) if self.pre_norm else x
        heads = self._attention(state, attention_input)
        x = x + linear(state, "self_attn.out_proj", heads)
        if not self.pre_norm:
            x = layer_norm(state, "self_attn_layer_norm", x, EPSILON)
        ffn_input = layer_norm(state, "final_layer_norm", x, EPSILON) if self.pre_norm else x
        active = ACTIVATIONS[self.activation](linear(state, "fc1", ffn_input))
        x = x + linear(state, "fc2", active)
        if not self.pre_norm:
            x = layer_norm(state, "final_layer_norm", x, EPSILON)
        return x, (attention_input, heads, ffn_input, active)

    def _attention(self, state: State, x: Array) -> Array:
        """Return the heads' outputs side by side, (B, T, D), for x (B, T, D)."""
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        query, key, value = (linear(state, name, x).reshape(*x.shape[:2], self.num_heads, -1) for name in names)
        return attend(query[:, :, :, None], key, value)

    def _head(self, state: State, x: Array) -> Array:
        if self.final_norm:
            x = layer_norm(state, "final_layer_norm", x, EPSILON)
        if self.embedding_size != self.hidden_size:
            x = linear(state, "project_out", x)
        return self.unembed(state, x)


def read_opt(config: Fields, prefix: str) -> OPT:
    """Return the network of a config.json; tensors' names start with `prefix`."""
    heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    if hidden_size % heads:
        raise config.error("hidden_size", f"a multiple of `num_attention_heads` ({heads})", hidden_size)
    pre_norm = config.flag("do_layer_norm_before", True)
    return OPT(
        prefix=prefix,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        embedding_size=config.size("word_embed_proj_dim", hidden_size),
        ffn_size=config.size("ffn_dim"),
        num_blocks=config.size("num_hidden_layers", most=MOST_BLOCKS),
        num_heads=heads,
        max_length=config.size("max_position_embeddings", 2048),
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        pre_norm=pre_norm,
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        bias=config.flag("enable_bias", True),
        affine=config.flag("layer_norm_elementwise_affine", True),
        tied=config.flag("tie_word_embeddings", True),
    )
