"""LLaMA and the families that differ from it in a few settings: Mistral, Qwen2, Qwen3.

References:
    Touvron et al., LLaMA, arXiv:2302.13971; Llama 3, arXiv:2407.21783; Mistral 7B, arXiv:2310.06825; Qwen2,
    arXiv:2407.10671; Qwen3, arXiv:2505.09388. Defaults of fields that a config.json leaves out: `transformers` 5.
"""

from dataclasses import dataclass

from jax import Array

from farms_jax.errors import InputError

from .fields import MOST_BLOCKS, Fields
from .network import Inputs, Network, PartKind, Shape
from .operations import ACTIVATIONS, State, attend, embedding, linear, linear_shapes, rms_norm
from .rope import Rope, read_rope, rotate

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")


_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
# A family's values for fields that a config.json leaves out.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


@dataclass(frozen=True, kw_only=True)
class Llama(Network):
    """A network of LLaMA's architecture."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    epsilon: float  # of the RMS norms
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm over each head's features of query and key
    windows: tuple[int | None, ...]  # per block, positions that a query sees; None: all before it

    input_groups = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    def _shapes(self, kind: PartKind) -> dict[str, Shape]:
        size, inner = self.hidden_size, self.intermediate_size
        if kind == "embed":
            return {"embed_tokens.weight": (self.vocab_size, size)}
        if kind == "head":
            return {"norm.weight": (size,), **self.head_shapes(size)}
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"input_layernorm.weight": (size,), "post_attention_layernorm.weight": (size,)}
        if self.qk_norm:
            shapes |= {f"self_attn.{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        return {
            **shapes,
            **linear_shapes("self_attn.q_proj", heads, size, self.qkv_bias),
            **linear_shapes("self_attn.k_proj", kv_heads, size, self.qkv_bias),
            **linear_shapes("self_attn.v_proj", kv_heads, size, self.qkv_bias),
            **linear_shapes("self_attn.o_proj", size, heads, self.o_bias),
            **linear_shapes("mlp.gate_proj", inner, size, self.mlp_bias),
            **linear_shapes("mlp.up_proj", inner, size, self.mlp_bias),
            **linear_shapes("mlp.down_proj", size, inner, self.mlp_bias),
        }

    def _block_constants(self, block: int) -> dict[str, float]:
        """Return the width of a block's sliding window, where any block has one.

        A number in the state, not in the code, so that one compilation serves blocks with and without it.
        """
        if not any(self.windows):
            return {}
        window = self.windows[block]
        return {"self_attn.window": float("inf") if window is None else window}

    def _embed(self, state: State, ids: Array) -> Array:
        return embedding(state, "embed_tokens", ids)

    def _block(self, state: State, x: Array) -> tuple[Array, Inputs]:
        attention_input = rms_norm(state, "input_layernorm", x, self.epsilon)
        heads = self._attention(state, attention_input)
        x = x + linear(state, "self_attn.o_proj", heads)
        mlp_input = rms_norm(state, "post_attention_layernorm", x, self.epsilon)
        gate = ACTIVATIONS[self.activation](linear(state, "mlp.gate_proj", mlp_input))
        gated = gate * linear(state, "mlp.up_proj", mlp_input)
        return x + linear(state, "mlp.down_proj", gated), (attention_input, heads, mlp_input, gated)

    def _attention(self, state: State, x: Array) -> Array:
        """Return the heads' outputs side by side, (B, T, heads * head_dim), for x (B, T, D)."""
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim)
        query = linear(state, "self_attn.q_proj", x).reshape(*x.shape[:2], *groups)
        key = linear(state, "self_attn.k_proj", x).reshape(*x.shape[:2], self.num_kv_heads, self.head_dim)
        value = linear(state, "self_attn.v_proj", x).reshape(key.shape)
        if self.qk_norm:
            query = rms_norm(state, "self_attn.q_norm", query, self.epsilon)
            key = rms_norm(state, "self_attn.k_norm", key, self.epsilon)
        return attend(rotate(query, self.rope), rotate(key, self.rope), value, state.get("self_attn.window"))

    def _head(self, state: State, x: Array) -> Array:
        return self.unembed(state, rms_norm(state, "norm", x, self.epsilon))


def read_llama(config: Fields, prefix: str) -> Llama:
    """Return the network of a config.json whose `model_type` is in DEFAULTS; tensors' names start with `prefix`."""
    model_type = config.choice("model_type", DEFAULTS)
    defaults = DEFAULTS[model_type]
    config.raise_if_set("use_mrope", "rotation over several axes is not supported")
    heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    # Null is as many as query heads, also where a field left out is another number.
    given = "num_key_value_heads" in config.content
    num_kv_heads = config.size("num_key_value_heads", heads if given else defaults.get("num_key_value_heads", heads))
    if heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of `num_attention_heads` ({heads})", num_kv_heads)
    if "head_dim" not in config and "head_dim" not in defaults and hidden_size % heads:
        raise config.error("hidden_size", f"a multiple of `num_attention_heads` ({heads})", hidden_size)
    head_dim = config.size("head_dim", defaults.get("head_dim", hidden_size // heads))
    if head_dim % 2:
        raise config.error("head_dim", "even", head_dim)
    has_bias = config.flag("attention_bias", False) if model_type in {"llama", "qwen3"} else False
    num_blocks = config.size("num_hidden_layers", most=MOST_BLOCKS)
    max_length = config.size("max_position_embeddings", defaults["max_position_embeddings"])
    return Llama(
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
        windows=_windows(config, model_type, num_blocks),
    )


def _windows(config: Fields, model_type: str, num_blocks: int) -> tuple[int | None, ...]:
    """Return the width of each block's sliding window."""
    if model_type == "llama":
        return (None,) * num_blocks
    default = DEFAULTS[model_type]["sliding_window"]
    # Null is no window here, not a field left out.
    is_null = config.content.get("sliding_window", default) is None
    window = None if is_null else config.size("sliding_window", default)
    if model_type == "mistral":
        return (window,) * num_blocks
    if not config.flag("use_sliding_window", False):
        window = None
    first = config.size("max_window_layers", 28, least=0)
    types = config.content.get("layer_types")
    if types is None:
        types = [FULL if window is None or block < first else SLIDING for block in range(num_blocks)]
    if not isinstance(types, list) or len(types) != num_blocks or any(kind not in LAYER_TYPES for kind in types):
        raise config.error("layer_types", f"a list of {num_blocks} of {', '.join(LAYER_TYPES)}", types)
    if window is None and SLIDING in types:
        raise InputError(f"{config.where}: `layer_types` has {SLIDING}, but `use_sliding_window` is not true")
    return tuple(window if kind == SLIDING else None for kind in types)
