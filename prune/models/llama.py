"""LLaMA and the families that differ from it in a switch: Mistral, Qwen2, Qwen3.

Module names are those of the checkpoints: `self_attn/q_proj/kernel`, `mlp/down_proj/kernel`, `input_layernorm/scale`.

References:
    Touvron et al., LLaMA, arXiv:2302.13971; Llama 3, arXiv:2407.21783; Mistral 7B, arXiv:2310.06825; Qwen2,
    arXiv:2407.10671; Qwen3, arXiv:2505.09388. Defaults of fields that a config.json leaves out: `transformers` 5.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from farms_jax.errors import InputError

from .conversion import Rule
from .fields import MOST_BLOCKS, Fields
from .layers import ACTIVATIONS, attend
from .network import Family
from .rope import Rope, read_rope, rotate

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Defaults:
    """What a family takes for fields that a config.json leaves out."""

    max_length: int
    num_kv_heads: int | None = None  # as many as query heads
    head_dim: int | None = None  # hidden_size / heads
    sliding_window: int | None = None


DEFAULTS = {
    "llama": Defaults(2048),
    "mistral": Defaults(131072, num_kv_heads=8, sliding_window=4096),
    "qwen2": Defaults(32768, num_kv_heads=32, sliding_window=4096),
    "qwen3": Defaults(32768, num_kv_heads=32, head_dim=128, sliding_window=4096),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a network of the LLaMA kind."""

    prefix: str  # of the tensors' names
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    activation: str
    epsilon: float  # of the RMS norms
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm over each head's features of query and key
    tied: bool  # the head's matrix is the embedding's
    windows: tuple[int | None, ...]  # per block, positions that a query sees; None: all before it

    def block_constants(self, block: int) -> dict[str, float]:
        """Return what is in a block's state beside the weights: the width of its sliding window, if any has one."""
        if not any(self.windows):
            return {}
        window = self.windows[block]
        return {"self_attn/window": float("inf") if window is None else window}


def read_config(config: Fields, prefix: str) -> LlamaConfig:
    """Read a config.json.

    Args:
        config: the file's content, `model_type` one of DEFAULTS.
        prefix: of the tensors' names.

    Returns:
        The shape of the network.

    Raises:
        InputError: for a field that is missing, of a wrong type, or has a value that is not supported.
    """
    model_type = config.choice("model_type", DEFAULTS)
    defaults = DEFAULTS[model_type]
    config.refuse("use_mrope", "rotation over several axes is not supported")
    heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    num_kv_heads = heads if "num_key_value_heads" in config.content else defaults.num_kv_heads or heads
    num_kv_heads = config.size("num_key_value_heads", num_kv_heads)
    if heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of `num_attention_heads` ({heads})", num_kv_heads)
    if "head_dim" not in config and not defaults.head_dim and hidden_size % heads:
        raise config.error("hidden_size", f"a multiple of `num_attention_heads` ({heads})", hidden_size)
    head_dim = config.size("head_dim", defaults.head_dim or hidden_size // heads)
    if head_dim % 2:
        raise config.error("head_dim", "even", head_dim)
    has_bias = config.flag("attention_bias", False) if model_type in {"llama", "qwen3"} else False
    num_blocks = config.size("num_hidden_layers", most=MOST_BLOCKS)
    max_length = config.size("max_position_embeddings", defaults.max_length)
    return LlamaConfig(
        prefix=prefix,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_blocks=num_blocks,
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        epsilon=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, max_length),
        qkv_bias=has_bias or model_type == "qwen2",
        o_bias=has_bias,
        mlp_bias=config.flag("mlp_bias", False) if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        tied=config.flag("tie_word_embeddings", False),
        windows=_windows(config, model_type, num_blocks, defaults.sliding_window),
    )


def _windows(config: Fields, model_type: str, num_blocks: int, default: int | None) -> tuple[int | None, ...]:
    """Returns the width of each block's sliding window."""
    if model_type == "llama":
        return (None,) * num_blocks
    window = None if config.is_null("sliding_window") else config.size("sliding_window", default)
    if model_type == "mistral":
        return (window,) * num_blocks
    if not config.flag("use_sliding_window", False):
        window = None
    first = config.size("max_window_layers", 28, least=0)
    types = config.content.get("layer_types")
    if types is None:
        types = [LAYER_TYPES[window is not None and block >= first] for block in range(num_blocks)]
    if not isinstance(types, list) or len(types) != num_blocks or any(kind not in LAYER_TYPES for kind in types):
        raise config.error("layer_types", f"a list of {num_blocks} of {', '.join(LAYER_TYPES)}", types)
    if window is None and LAYER_TYPES[1] in types:
        raise InputError(f"{config.where}: `layer_types` has {LAYER_TYPES[1]}, but `use_sliding_window` is not true")
    return tuple(window if kind == LAYER_TYPES[1] else None for kind in types)


class LlamaEmbedding(nnx.Module):
    """Token embedding."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns (B, T, D) for ids (B, T)."""
        return self.embed_tokens(ids)


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions, without the projection of its output."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        self.config = config
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nnx.Linear(config.hidden_size, heads, use_bias=config.qkv_bias, rngs=rngs)
        self.k_proj = nnx.Linear(config.hidden_size, kv_heads, use_bias=config.qkv_bias, rngs=rngs)
        self.v_proj = nnx.Linear(config.hidden_size, kv_heads, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = nnx.Linear(heads, config.hidden_size, use_bias=config.o_bias, rngs=rngs)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.epsilon, rngs=rngs)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.epsilon, rngs=rngs)
        if any(config.windows):
            # A number in the state, not in the code, so that one compilation serves blocks with and without it.
            self.window = nnx.Variable(jnp.float32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the heads' outputs side by side, (B, T, heads * head_dim), for x (B, T, D)."""
        config = self.config
        heads = (config.num_kv_heads, config.head_dim)
        groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
        query = self.q_proj(x).reshape(*x.shape[:2], *groups)
        key = self.k_proj(x).reshape(*x.shape[:2], *heads)
        value = self.v_proj(x).reshape(*x.shape[:2], *heads)
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        window = self.window[...] if any(config.windows) else None
        return attend(rotate(query, config.rope), rotate(key, config.rope), value, window)


class LlamaMLP(nnx.Module):
    """Gated feed-forward network, without the projection of its output."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        inner, outer, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = nnx.Linear(outer, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(outer, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, outer, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the gated features (B, T, intermediate_size) for x (B, T, D)."""
        return ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)


class LlamaBlock(nnx.Module):
    """Attention and feed-forward network, each behind a norm and beside a skip."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.epsilon, rngs=rngs)
        self.self_attn = LlamaAttention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.epsilon, rngs=rngs)
        self.mlp = LlamaMLP(config, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (B, T, D) for x (B, T, D), and the input of each group of INPUT_GROUPS."""
        attention_input = self.input_layernorm(x)
        heads = self.self_attn(attention_input)
        x = x + self.self_attn.o_proj(heads)
        mlp_input = self.post_attention_layernorm(x)
        gated = self.mlp(mlp_input)
        return x + self.mlp.down_proj(gated), (attention_input, heads, mlp_input, gated)


class LlamaHead(nnx.Module):
    """Final norm and the product with the head's matrix, or with the embedding's if they are tied."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        self.tied = config.tied
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.epsilon, rngs=rngs)
        if config.tied:
            self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        else:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (B, T, V) for x (B, T, D)."""
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.tied else self.lm_head(x)


INPUT_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def rules(config: LlamaConfig) -> list[Rule]:
    """Return the conversion table."""
    prefix = re.escape(config.prefix)
    block = rf"{prefix}layers\.(?P<block>\d+)\."
    linear = rf"{block}(?P<module>self_attn|mlp)\.(?P<linear>[qkvo]_proj|gate_proj|up_proj|down_proj)"
    return [
        Rule(
            rf"{prefix}embed_tokens\.weight", ("embed", "head") if config.tied else ("embed",), "embed_tokens/embedding"
        ),
        Rule(rf"{linear}\.weight", ("block",), r"\g<module>/\g<linear>/kernel", transposed=True),
        Rule(rf"{linear}\.bias", ("block",), r"\g<module>/\g<linear>/bias"),
        Rule(rf"{block}self_attn\.([qk]_norm)\.weight", ("block",), r"self_attn/\2/scale"),
        Rule(rf"{block}(input_layernorm|post_attention_layernorm)\.weight", ("block",), r"\2/scale"),
        Rule(rf"{prefix}norm\.weight", ("head",), "norm/scale"),
        Rule(r"lm_head\.weight", () if config.tied else ("head",), "lm_head/kernel", transposed=True),
        # Frequencies that older versions of `transformers` saved; ours come from the config.
        Rule(rf"{block}self_attn\.rotary_emb\.inv_freq", ()),
    ]


LLAMA = Family((LlamaEmbedding, LlamaBlock, LlamaHead), INPUT_GROUPS, rules)
