"""The families of decoders: of each what its config.json and its tensors are called, and where it differs.

A family that differs by switches of `Decoder` takes one entry in `DECODERS`.

References:
    Touvron et al., LLaMA, arXiv:2302.13971; Llama 3, arXiv:2407.21783; Mistral 7B, arXiv:2310.06825; Qwen2,
    arXiv:2407.10671; Qwen3, arXiv:2505.09388; Phi-3, arXiv:2404.14219; Gemma 2, arXiv:2408.00118; Gemma 3,
    arXiv:2503.19786; SmolLM3, https://huggingface.co/blog/smollm3; OLMo 2, arXiv:2501.00656; GPT-NeoX,
    arXiv:2204.06745; GPT-2, Radford et al. 2019; Falcon, arXiv:2311.16867. Defaults of fields that a config.json leaves
    out: `transformers` 5.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farms_jax.errors import InputError

from .decoder import LLAMA, Decoder, Names
from .fields import MOST, MOST_BLOCKS, Fields
from .operations import ACTIVATIONS
from .rope import THETA, Rope, make_rope, read_rope

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")

_MOST_FEATURES = 2**16  # of a head, where frequencies are computed for a check

Switches = dict[str, Any]  # fields of a Decoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's config is read, and what its tensors are called."""

    modules: Names = LLAMA
    prefixes: tuple[str, str] = ("model.", "")  # of the tensors, with and without a language model head
    outside: Mapping[str, str] = field(default_factory=dict)  # fields of a Network: names of modules outside of a block
    fields: Mapping[str, str] = field(default_factory=dict)  # LLaMA's name of a field of config.json -> this family's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields, by LLaMA's names, that a config leaves out
    rope: Rope | None = Rope()  # base and share of turned features, where the config does not say; None: no rotation
    rope_share: str | None = None  # field of the config for that share, if the family has one
    rope_kinds: Mapping[str, str] = field(default_factory=dict)  # other names of kinds of rotation
    qkv_bias: str | bool = False  # a field of the config, or whether there is one
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    windows: Callable[[Fields, "Family", int], tuple[int | None, ...]] | None = None  # per block, of a number of them
    foreign: tuple[str, ...] = ()  # fields that change the numbers in an unsupported way
    switches: Mapping[str, Any] = field(default_factory=dict)  # that are the same for all models
    more: Callable[[Fields, Switches], Switches] | None = None  # those to change, where they depend on the config


def _windows_everywhere(config: Fields, family: Family, num_blocks: int) -> tuple[int | None, ...]:
    return (_window(config, family),) * num_blocks


def _window(config: Fields, family: Family) -> int | None:
    default = family.defaults["sliding_window"]
    return None if config.is_null("sliding_window", default) else config.size("sliding_window", default)


def _windows_on_request(config: Fields, family: Family, num_blocks: int) -> tuple[int | None, ...]:
    """Return the windows of blocks after the first `max_window_layers`, or of those without rotation."""
    window = _window(config, family) if config.flag("use_sliding_window", False) else None
    if "max_window_layers" in family.defaults:
        first = config.size("max_window_layers", family.defaults["max_window_layers"], least=0)
        slides = [block >= first for block in range(num_blocks)]
    else:
        slides = [not turns for turns in _turns(config, num_blocks)]
    types = _layer_types(config, [SLIDING if window and sliding else FULL for sliding in slides])
    if window is None and SLIDING in types:
        raise InputError(f"{config.where}: `layer_types` has {SLIDING}, but `use_sliding_window` is not true")
    return tuple(window if kind == SLIDING else None for kind in types)


def _windows_in_turns(config: Fields, family: Family, num_blocks: int) -> tuple[int | None, ...]:
    """Return the windows of all but every second or sixth block."""
    window = _window(config, family)
    return tuple(window if kind == SLIDING else None for kind in _types_in_turns(config, family, num_blocks))


def _types_in_turns(config: Fields, family: Family, num_blocks: int) -> list[str]:
    pattern = family.defaults["sliding_window_pattern"]
    if pattern != 2:  # Gemma 2 has no such field
        pattern = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", pattern))
    return _layer_types(config, [SLIDING if (block + 1) % pattern else FULL for block in range(num_blocks)])


def _layer_types(config: Fields, default: list[str]) -> list[str]:
    types = config.content.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, list) or len(types) != len(default) or any(kind not in LAYER_TYPES for kind in types):
        raise config.error("layer_types", f"a list of {len(default)} of {', '.join(LAYER_TYPES)}", types)
    return types


def _turns(config: Fields, num_blocks: int) -> list[bool]:
    """Return which blocks of SmolLM3 have a rotation."""
    turns = config.content.get("no_rope_layers")
    if turns is None:
        interval = config.size("no_rope_layer_interval", 4)
        return [bool((block + 1) % interval) for block in range(num_blocks)]
    if not isinstance(turns, list) or len(turns) < num_blocks or any(turn not in (0, 1) for turn in turns):
        raise config.error("no_rope_layers", f"a list of {num_blocks} of 0 and 1, 1 where a block rotates", turns)
    return [bool(turn) for turn in turns[:num_blocks]]


def _smollm3(config: Fields, found: Switches) -> Switches:
    [rope], turns = found["ropes"], _turns(config, found["num_blocks"])
    return _by_block([rope if turn else Rope(kind="none", share=rope.share) for turn in turns])


def _by_block(ropes: list[Rope]) -> Switches:
    distinct = tuple(dict.fromkeys(ropes))
    return {"ropes": distinct, "block_ropes": tuple(map(distinct.index, ropes))}


def _gemma(config: Fields, found: Switches) -> Switches:
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    return {
        "embedding_scale": found["hidden_size"] ** 0.5,
        "scales": (scale,) * found["num_blocks"],
        "logit_limit": _limit(config, "final_logit_softcapping", 30.0),
        "attention_limit": _limit(config, "attn_logit_softcapping", 50.0),
    }


def _limit(config: Fields, name: str, default: float | None) -> float | None:
    return None if config.is_null(name, default) else config.number(name, default)


def _gemma3(config: Fields, found: Switches) -> Switches:
    """Return the switches of Gemma 3, whose rotation has another base in blocks with a window."""
    config.raise_if_set("attn_logit_softcapping", "transformers ignores it for this family")
    tables = config.table("rope_parameters") or Fields({}, config.where)
    own, local = (tables.table(kind) or Fields({}) for kind in LAYER_TYPES)
    own = config.table("rope_scaling") or own
    for table in (own, local):
        table.raise_if_set("partial_rotary_factor", "this family turns all features of a head", harmless=1)
    theta = own.number("rope_theta", config.number("rope_theta", 1e6))
    local_theta = local.number("rope_theta", config.number("rope_local_base_freq", THETA))
    ropes = {
        FULL: make_rope(own, Rope(theta), config, found["max_length"]),
        SLIDING: make_rope(local, Rope(local_theta), config, found["max_length"]),
    }
    types = _types_in_turns(config, DECODERS["gemma3_text"], found["num_blocks"])
    limits = {"attention_limit": None, "logit_limit": _limit(config, "final_logit_softcapping", None)}
    return _gemma(config, found) | limits | _by_block([ropes[kind] for kind in types])


def _gpt_neox(config: Fields, found: Switches) -> Switches:
    del found
    return {"parallel": config.flag("use_parallel_residual", True)}


def _gpt2(config: Fields, found: Switches) -> Switches:
    scale = found["head_dim"] ** -0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_block = config.flag("scale_attn_by_inverse_layer_idx", False)
    return {"scales": tuple(scale / (block + 1 if by_block else 1) for block in range(found["num_blocks"]))}


def _falcon(config: Fields, found: Switches) -> Switches:
    modules, heads = found["modules"], found["num_heads"]
    if config.flag("new_decoder_architecture", False):
        if config.size("num_ln_in_parallel_attn", 2, most=2) == 2:
            modules = dataclasses.replace(modules, pre_attention_norm="ln_attn", pre_mlp_norm="ln_mlp")
        kv_heads = config.size("num_kv_heads", heads)
        if heads % kv_heads:
            raise config.error("num_kv_heads", f"a divisor of `num_attention_heads` ({heads})", kv_heads)
        return {"modules": modules, "parallel": True, "num_kv_heads": kv_heads}
    kv_heads = 1 if config.flag("multi_query", True) else heads
    if config.flag("parallel_attn", True):
        if config.size("num_ln_in_parallel_attn", 1) != 1:
            raise config.error("num_ln_in_parallel_attn", "1 in the older architecture", 2)
        return {"parallel": True, "num_kv_heads": kv_heads}
    modules = dataclasses.replace(modules, pre_mlp_norm="post_attention_layernorm")
    return {"modules": modules, "num_kv_heads": kv_heads}


_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_NAMES = Names(
    post_attention_norm="post_attention_layernorm",
    pre_mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
_FALCON_NAMES = Names(
    attention="self_attention",
    query_key_value=("query_key_value",),
    attention_out="dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    pre_mlp_norm="",
    final_norm="ln_f",
)
_LAYER_NORM = {"norm": "layer", "gated": False}

DECODERS: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}, mlp_bias="mlp_bias", **_ATTENTION_BIAS),
    "mistral": Family(
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows=_windows_everywhere,
    ),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, windows=_windows_on_request),
    "qwen3": Family(
        defaults=_QWEN | {"head_dim": 128},
        windows=_windows_on_request,
        switches={"qk_norm": "head"},
        **_ATTENTION_BIAS,
    ),
    "phi3": Family(
        modules=Names(query_key_value=("qkv_proj",), up=("mlp.gate_up_proj",)),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
        },
        rope_share="partial_rotary_factor",
        rope_kinds={"su": "longrope", "yarn": "longrope"},
        windows=_windows_everywhere,
    ),
    "gemma2": Family(
        modules=_GEMMA_NAMES,
        fields={"hidden_act": "hidden_activation"},
        defaults=_GEMMA | {"max_position_embeddings": 8192, "sliding_window_pattern": 2},
        windows=_windows_in_turns,
        foreign=("use_bidirectional_attention",),
        switches={"norm_offset": 1.0},
        more=_gemma,
        **_ATTENTION_BIAS,
    ),
    "gemma3_text": Family(
        modules=_GEMMA_NAMES,
        fields={"hidden_act": "hidden_activation"},
        defaults=_GEMMA | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
        rope=None,
        windows=_windows_in_turns,
        foreign=("use_bidirectional_attention",),
        switches={"norm_offset": 1.0, "qk_norm": "head"},
        more=_gemma3,
        **_ATTENTION_BIAS,
    ),
    "smollm3": Family(
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        rope=Rope(2e6),
        windows=_windows_on_request,
        mlp_bias="mlp_bias",
        more=_smollm3,
        **_ATTENTION_BIAS,
    ),
    "olmo2": Family(
        modules=Names(
            pre_attention_norm="",
            post_attention_norm="post_attention_layernorm",
            pre_mlp_norm="",
            post_mlp_norm="post_feedforward_layernorm",
        ),
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        switches={"qk_norm": "all"},
        **_ATTENTION_BIAS,
    ),
    "gpt_neox": Family(
        modules=dataclasses.replace(
            _FALCON_NAMES,
            attention="attention",
            pre_mlp_norm="post_attention_layernorm",
            final_norm="final_layer_norm",
        ),
        prefixes=("gpt_neox.", ""),
        outside={"token_table": "embed_in", "head_module": "embed_out"},
        fields={"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base"},
        defaults={
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
        },
        rope=Rope(share=0.25),
        rope_share="rotary_pct",
        mlp_bias=True,
        switches=_LAYER_NORM | {"fused": "grouped"},
        more=_gpt_neox,
        **_ATTENTION_BIAS,
    ),
    "gpt2": Family(
        modules=Names(
            attention="attn",
            query_key_value=("c_attn",),
            attention_out="c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            pre_attention_norm="ln_1",
            pre_mlp_norm="ln_2",
            final_norm="ln_f",
        ),
        prefixes=("transformer.", ""),
        outside={"block_list": "h", "token_table": "wte", "position_table": "wpe"},
        fields={
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={
            "hidden_act": "gelu_new",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "intermediate_size": 4,
        },
        rope=None,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        foreign=("add_cross_attention",),
        switches=_LAYER_NORM | {"stored_in_out": True},
        more=_gpt2,
    ),
    "falcon": Family(
        modules=_FALCON_NAMES,
        prefixes=("transformer.", ""),
        outside={"block_list": "h", "token_table": "word_embeddings"},
        fields={
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "intermediate_size": 4,
        },
        qkv_bias="bias",
        o_bias="bias",
        mlp_bias="bias",
        foreign=("alibi",),
        switches=_LAYER_NORM | {"fused": "grouped"},
        more=_falcon,
    ),
}


def read_decoder(config: Fields, prefix: str) -> Decoder:
    """Return the network of a config.json whose `model_type` is in DECODERS; tensors' names start with `prefix`."""
    model_type = config.choice("model_type", DECODERS)
    family = DECODERS[model_type]
    config.raise_if_set("use_mrope", "rotation over several axes is not supported")
    for name in family.foreign:
        config.raise_if_set(name, "not supported")

    def own(name: str) -> str:
        return family.fields.get(name, name)

    def bias(switch: str | bool) -> bool:
        return config.flag(switch, family.defaults.get(switch, False)) if isinstance(switch, str) else switch

    heads, hidden_size = config.size(own("num_attention_heads")), config.size(own("hidden_size"))
    default_size = family.defaults.get("intermediate_size")  # in hidden sizes
    num_blocks = config.size(own("num_hidden_layers"), most=MOST_BLOCKS)
    max_length = config.size(own("max_position_embeddings"), family.defaults["max_position_embeddings"])
    found: Switches = {
        "prefix": prefix,
        "modules": family.modules,
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": config.size(own("intermediate_size"), default_size and default_size * hidden_size),
        "num_blocks": num_blocks,
        "num_heads": heads,
        "num_kv_heads": _num_kv_heads(config, family, heads),
        "head_dim": _head_dim(config, family, hidden_size, heads),
        "max_length": max_length,
        "activation": config.choice(own("hidden_act"), ACTIVATIONS, family.defaults.get("hidden_act", "silu")),
        "epsilon": config.number(own("rms_norm_eps"), family.defaults.get("rms_norm_eps", 1e-6)),
        "qkv_bias": bias(family.qkv_bias),
        "o_bias": bias(family.o_bias),
        "mlp_bias": bias(family.mlp_bias),
        "tied": config.flag("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False)),
        "windows": family.windows(config, family, num_blocks) if family.windows else (None,) * num_blocks,
        **family.outside,
        **family.switches,
    }
    if family.rope is not None:
        found["ropes"] = (_rope(config, family, max_length),)
    if family.more is not None:
        found |= family.more(config, found)
    ropes = found.get("ropes", ())
    if factor := max((rope.factor for rope in ropes if rope.kind == "dynamic"), default=None):
        found["max_length"] = int(min(max_length * factor, MOST))
    _check_ropes(config, found["head_dim"], found["max_length"], ropes)
    return Decoder(**found)


def _num_kv_heads(config: Fields, family: Family, heads: int) -> int:
    # Null is as many as query heads, also where a field left out is another number.
    given = "num_key_value_heads" in config.content
    number = config.size("num_key_value_heads", heads if given else family.defaults.get("num_key_value_heads", heads))
    if heads % number:
        raise config.error("num_key_value_heads", f"a divisor of `num_attention_heads` ({heads})", number)
    return number


def _head_dim(config: Fields, family: Family, hidden_size: int, heads: int) -> int:
    if "head_dim" not in config and "head_dim" not in family.defaults and hidden_size % heads:
        names = [family.fields.get(name, name) for name in ("hidden_size", "num_attention_heads")]
        raise config.error(names[0], f"a multiple of `{names[1]}` ({heads})", hidden_size)
    return config.size("head_dim", family.defaults.get("head_dim", hidden_size // heads))


def _rope(config: Fields, family: Family, max_length: int) -> Rope:
    """Return the rotation of a config, with the family's names and defaults for its fields."""
    content = dict(config.content)
    length = "original_max_position_embeddings"
    if length in family.defaults and length not in config:
        content[length] = family.defaults[length]
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(scaling := content.get(name), Mapping):
            kinds = {
                key: family.rope_kinds.get(scaling[key], scaling[key])
                for key in ("type", "rope_type")
                if key in scaling and isinstance(scaling[key], str)
            }
            content[name] = {**scaling, **kinds}
    if (theta := family.fields.get("rope_theta")) is not None and content.get(theta) is not None:
        content["rope_theta"] = content[theta]
    return read_rope(Fields(content, config.where), max_length, family.rope or Rope(), family.rope_share)


def _check_ropes(config: Fields, head_dim: int, max_length: int, ropes: tuple[Rope, ...]) -> None:
    for rope in ropes:
        count = rope.features(head_dim)
        if count % 2 or not count:
            what = "even" if rope.share == 1 else f"so that its turned share ({rope.share}) is even"
            raise config.error("head_dim", what, head_dim)
        for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if rope.kind == "longrope" and len(factors) != count // 2:
                raise config.error(name, f"a list of {count // 2} numbers", list(factors))
        if rope.kind in {"dynamic", "yarn", "longrope"} and not _is_finite(rope, head_dim, max_length):
            raise config.error("rope_scaling", f"numbers that give finite frequencies for {count} features", rope.kind)


def _is_finite(rope: Rope, head_dim: int, max_length: int) -> bool:
    if not 4 <= rope.features(head_dim) <= _MOST_FEATURES:
        return False
    try:
        with np.errstate(all="ignore"):
            return all(np.isfinite(rope.frequencies(head_dim, length)).all() for length in (1, max_length))
    except ArithmeticError:
        return False
