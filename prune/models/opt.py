"""OPT, 125M to 66B; the 350M differs: norms behind the skips, embeddings of half the width, no final norm.

Module names are those of the checkpoints: `self_attn/k_proj/kernel`, `fc1/kernel`, `final_layer_norm/scale`.

References:
    Zhang et al., OPT, arXiv:2205.01068. Defaults of fields that a config.json leaves out: `transformers` 5.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from .conversion import Rule
from .fields import MOST_BLOCKS, Fields
from .layers import ACTIVATIONS, attend
from .network import Family

OFFSET = 2  # rows of the position embedding that stand before that of the first position
EPSILON = 1e-5  # of the norms


@dataclass(frozen=True)
class OPTConfig:
    """The shape of an OPT."""

    prefix: str  # of the tensors' names
    vocab_size: int
    hidden_size: int
    embedding_size: int  # of the tokens; projected to hidden_size if it is another
    ffn_size: int
    num_blocks: int
    num_heads: int
    max_length: int
    activation: str
    pre_norm: bool  # norms before attention and feed-forward network, else behind the skips
    final_norm: bool
    bias: bool  # of a block's linears
    affine: bool  # norms have scale and bias
    tied: bool  # the head's matrix is the embedding's

    def block_constants(self, block: int) -> dict[str, float]:
        """Return what is in a block's state beside the weights: nothing."""
        del block
        return {}


def read_config(config: Fields, prefix: str) -> OPTConfig:
    """Read a config.json.

    Args:
        config: the file's content.
        prefix: of the tensors' names.

    Returns:
        The shape of the network.

    Raises:
        InputError: for a field that is missing, of a wrong type, or has a value that is not supported.
    """
    heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    if hidden_size % heads:
        raise config.error("hidden_size", f"a multiple of `num_attention_heads` ({heads})", hidden_size)
    pre_norm = config.flag("do_layer_norm_before", True)
    return OPTConfig(
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


class OPTEmbedding(nnx.Module):
    """Sum of token and position embedding."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        width, size = config.hidden_size, config.embedding_size
        self.embed_tokens = nnx.Embed(config.vocab_size, size, rngs=rngs)
        self.embed_positions = nnx.Embed(config.max_length + OFFSET, width, rngs=rngs)
        self.projects = size != width
        if self.projects:
            self.project_in = nnx.Linear(size, width, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns (B, T, D) for ids (B, T)."""
        tokens = self.embed_tokens(ids)
        if self.projects:
            tokens = self.project_in(tokens)
        return tokens + self.embed_positions(jnp.arange(ids.shape[1]) + OFFSET)[None]


class OPTAttention(nnx.Module):
    """Multi-head attention, without the projection of its output."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.k_proj = nnx.Linear(width, width, use_bias=config.bias, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, use_bias=config.bias, rngs=rngs)
        self.q_proj = nnx.Linear(width, width, use_bias=config.bias, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, use_bias=config.bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the heads' outputs side by side, (B, T, D), for x (B, T, D)."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return attend(query[:, :, :, None], key, value)


class OPTBlock(nnx.Module):
    """Attention and feed-forward network, each with a norm and beside a skip."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        width = config.hidden_size
        self.pre_norm = config.pre_norm
        self.activation = config.activation
        self.self_attn = OPTAttention(config, rngs)
        self.self_attn_layer_norm = _norm(config, rngs)
        self.fc1 = nnx.Linear(width, config.ffn_size, use_bias=config.bias, rngs=rngs)
        self.fc2 = nnx.Linear(config.ffn_size, width, use_bias=config.bias, rngs=rngs)
        self.final_layer_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (B, T, D) for x (B, T, D), and the input of each group of INPUT_GROUPS."""
        attention_input = self.self_attn_layer_norm(x) if self.pre_norm else x
        heads = self.self_attn(attention_input)
        x = x + self.self_attn.out_proj(heads)
        if not self.pre_norm:
            x = self.self_attn_layer_norm(x)
        ffn_input = self.final_layer_norm(x) if self.pre_norm else x
        active = ACTIVATIONS[self.activation](self.fc1(ffn_input))
        x = x + self.fc2(active)
        if not self.pre_norm:
            x = self.final_layer_norm(x)
        return x, (attention_input, heads, ffn_input, active)


class OPTHead(nnx.Module):
    """Final norm, projection to the embedding's width, and the product with the head's or the embedding's matrix."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        self.config = config
        size = config.embedding_size
        if config.final_norm:
            self.final_layer_norm = _norm(config, rngs)
        if size != config.hidden_size:
            self.project_out = nnx.Linear(config.hidden_size, size, use_bias=False, rngs=rngs)
        if config.tied:
            self.embed_tokens = nnx.Embed(config.vocab_size, size, rngs=rngs)
        else:
            self.lm_head = nnx.Linear(size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (B, T, V) for x (B, T, D)."""
        if self.config.final_norm:
            x = self.final_layer_norm(x)
        if self.config.embedding_size != self.config.hidden_size:
            x = self.project_out(x)
        return self.embed_tokens.attend(x) if self.config.tied else self.lm_head(x)


def _norm(config: OPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, a difference of means of squares, loses digits where one feature is far larger than the rest.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=EPSILON,
        use_bias=config.affine,
        use_scale=config.affine,
        use_fast_variance=False,
        rngs=rngs,
    )


INPUT_GROUPS = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)


def rules(config: OPTConfig) -> list[Rule]:
    """Return the conversion table."""
    prefix = re.escape(config.prefix)
    block = rf"{prefix}layers\.(?P<block>\d+)\."
    projection = rf"{block}self_attn\.((?:[kvq]|out)_proj)"
    norm = rf"{block}(self_attn_layer_norm|final_layer_norm)"
    token_parts = ("embed", "head") if config.tied else ("embed",)
    return [
        Rule(rf"{prefix}embed_tokens\.weight", token_parts, "embed_tokens/embedding"),
        Rule(rf"{prefix}embed_positions\.weight", ("embed",), "embed_positions/embedding"),
        Rule(rf"{prefix}project_in\.weight", ("embed",), "project_in/kernel", transposed=True),
        Rule(rf"{projection}\.weight", ("block",), r"self_attn/\2/kernel", transposed=True),
        Rule(rf"{projection}\.bias", ("block",), r"self_attn/\2/bias"),
        Rule(rf"{block}(fc[12])\.weight", ("block",), r"\2/kernel", transposed=True),
        Rule(rf"{block}(fc[12])\.bias", ("block",), r"\2/bias"),
        Rule(rf"{norm}\.weight", ("block",), r"\2/scale"),
        Rule(rf"{norm}\.bias", ("block",), r"\2/bias"),
        Rule(rf"{prefix}final_layer_norm\.weight", ("head",), "final_layer_norm/scale"),
        Rule(rf"{prefix}final_layer_norm\.bias", ("head",), "final_layer_norm/bias"),
        Rule(rf"{prefix}project_out\.weight", ("head",), "project_out/kernel", transposed=True),
        Rule(r"lm_head\.weight", () if config.tied else ("head",), "lm_head/kernel", transposed=True),
    ]


OPT = Family((OPTEmbedding, OPTBlock, OPTHead), INPUT_GROUPS, rules)
