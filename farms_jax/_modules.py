"""What a layer is in its network, from its name: its type, and where it comes.

The names are those of Hugging Face, GGUF, torchvision, timm, Flax, MaxText, T5X and Meta. A name that the tables do not
know has its own last word as its type, and keeps its natural place.

>>> types(["model.embed_tokens.weight", "blk.0.attn_q.weight", "h.0.mlp.c_proj.weight"])
['embedding', 'q', 'down']
>>> network_order(["fc.weight", "layer1.0.conv1.weight", "conv1.weight"])
['conv1.weight', 'layer1.0.conv1.weight', 'fc.weight']
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from farms_jax._names import block_of, module_of, natural_key

# Around the blocks, each by whole parts of the path: what it is, its rank among what stands beside it, its words.
_AROUND: tuple[tuple[str, int, str], ...] = (
    ("stem", -1, r"patch_?embed(der|ding|dings)?|(conv_?)?(stem|init|in|root)\d*|(proj|project|linear)_in|input_proj"),
    ("embedding", -2, r"(.*_)?(embed|embd|embedder|embedding|embeddings)(_tokens|_in|s|_?\d+)?|wte|wpe|shared"),
    ("embedding", -2, r"(tok|token|position|pos)_emb\w*|embed_(positions|tokens)\w*|time_text_embed|add_embedding"),
    (
        "",
        0,
        r"encoder|vision_(tower|model|encoder|embed_tokens)|visual|audio_(tower|encoder)|image_encoder|down_blocks",
    ),
    ("", 1, r"mid_block|bottleneck"),
    ("", 4, r"(.*_)?(projector|connector|merger)"),
    ("", 5, r"decoder|language_model|text_(model|decoder)|up_blocks"),
    ("head", 8, r"conv_head|pooler|pre_logits"),
    (
        "head",
        9,
        r"(lm_)?heads?|output|embed_out|(.*_)?logits(_\w+)?|.*classifiers?|fc|cls|score|(proj|project|conv)_out|qa_outputs",
    ),
    ("head", 9, r"(text|visual)_projection|unembed\w*|.*_head"),
)
_BEFORE_BLOCKS, _BLOCKS, _AFTER_BLOCKS = 1, 2, 3

# Within a block, first match first: type, place, the end of its path. `@` stands for a part with "attn" or "attention".
_WITHIN: tuple[tuple[str, int, str], ...] = (
    ("norm", 0, r".*(norm|ln|adaln)\w*(\.\w+)?"),
    ("router", 10, r"router|\w*gate_inp|(moe|\w*sparse\w*)\.gate|gate\.wg"),
    ("qkv", 1, r"w?qkv(_proj|_einsum)?|(attn_|to_)qkv|c_attn|query_key_value|@\.in_proj(_weight)?"),
    ("kv", 2, r"(attn_|to_|w)?kv(_proj|_einsum|_[ab]\w*)?|key_value"),
    ("q", 1, r"(attn_|to_|w)?q(_proj|_einsum|_lin|_[ab]\w*)?|query(_proj)?|query_layer"),
    ("k", 2, r"(attn_|to_|w)?k(_proj|_lin)?|key(_proj)?|key_layer"),
    ("v", 3, r"(attn_|to_|w)?v(_proj|_lin)?|value(_proj)?|value_layer"),
    (
        "o",
        4,
        r"o|o_proj|out_lin|attn_(output|vec_einsum|out)|to_out(\.0)?|@\.(\w+\.)?(out|out_proj|wo|c_proj|proj|dense|out_layer)",
    ),
    ("gate and up", 11, r"gate_up_proj|gating_einsum|gate_up|w12|ffn_gate_up|\w*gate_up_exps"),
    ("gate", 11, r"gate(_proj)?|ffn_gate(_\w+)?|wi_0|w1"),
    (
        "up",
        12,
        r"up(_proj)?|ffn_up(_\w+)?|wi(_1)?|w3|fc1|fc_in|c_fc|lin(ear)?1|dense_h_to_4h|intermediate\.dense|\w*mlp\w*\.dense_0",
    ),
    ("up", 12, r"ff\.net\.0\.proj|input_linear"),
    (
        "down",
        13,
        r"down(_proj)?|ffn_down(_\w+)?|wo|w2|fc2|fc_out|c_proj|lin(ear)?2|dense_4h_to_h|output\.dense|\w*mlp\w*\.dense_1",
    ),
    ("down", 13, r"ff\.net\.2|output_linear|mlp\.linear"),
    ("shortcut", 40, r"(.*\.)?(down_?sampl\w*|shortcut|conv_shortcut|conv_proj|skip\w*)(\.\w+)*"),
    ("input", 1, r"weight_ih_l\d+(_reverse)?"),
    ("recurrent", 2, r"weight_hh_l\d+(_reverse)?"),
    ("in", 0, r"in_proj\w*"),
    ("depthwise", 6, r"conv_dw|(.*_)?depthwise\w*|dw_?conv\w*"),
    ("squeeze", 7, r"se\.\w+"),
    ("pointwise", 5, r"conv_pw|expand_1x1\w*(\.\w+)?"),
    ("pointwise", 8, r"conv_pwl|pw_?conv\d*|reduce_1x1\w*(\.\w+)?"),
    ("conv", 1, r"mixer\.conv1d"),
    ("x", 6, r"x_proj"),
    ("dt", 7, r"dt_proj"),
    ("out", 9, r"out_proj"),
)
_UNKNOWN = 5  # place of what the table does not have, as convolutions
_CROSS = r"encoder_attn|cross_?att\w*|encdecattention|encoder_decoder_attention|multihead_attn|attn2"
_OF_KERNELS = {"stem", "head", "shortcut", "depthwise", "pointwise", "squeeze"}
_SHARED, _EXPERTS = r"shared_?experts?|shared_mlp|\w*_shexp", r"experts?|\w*_exps|\w*moe\w*"
_LEAF = r"(?i)([./](weight|kernel|w|embedding|weight_v|qweight))?(\[[\d,]*\])?$"


def types(names: Sequence[str], kernels: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """Return the type of each layer; `kernels` has the shorter side of the matrices of each convolution."""
    with_experts = any(re.search(r"expert|_exps", name) for name in names)
    return [_type(name, kernels.get(name, 0), with_experts=with_experts) for name in names]


def network_order(names: Sequence[str], as_written: Sequence[str] = ()) -> list[str]:
    """Return names in the order of the network.

    Args:
        names: names of layers, in natural order.
        as_written: names of the arrays as their file lists them, where it lists them in an order of its own: that is
            taken over, but where it is the alphabet's, or where layers lie in stacks.
    """
    stacked = any(name.endswith("]") for name in names)
    if as_written and not stacked and list(as_written) != sorted(as_written, key=lambda name: re.split("[/.]", name)):
        place = {name: i for i, name in enumerate(as_written)}
        if all(name in place for name in names):
            return sorted(names, key=place.__getitem__)
    with_experts = any(re.search(r"expert|_exps", name) for name in names)
    return sorted(names, key=lambda name: _depth(name, with_experts=with_experts))


def _path(name: str) -> str:
    """Return the path of a module in small letters, with dots: `params/Dense_0/kernel[2]` -> `params.dense_0`."""
    return re.sub(_LEAF, "", name, count=1).replace("/", ".").lower()


def _is_numbered(part: str) -> bool:
    return bool(re.fullmatch(r"\d+|\w*(layer|block|stage|stack|scan[a-z]*)s?_?\d+|h_?\d+", part))


def _around(path: str) -> tuple[list[int], str]:
    """Return the ranks of the parts before the first block, the last one its own, and the type of what lies there."""
    ranks = []
    for part in path.split("."):
        if _is_numbered(part):
            return [*ranks, _BLOCKS], ""
        kind, rank = next(((kind, rank) for kind, rank, words in _AROUND if re.fullmatch(words, part)), ("", None))
        if rank is not None:
            ranks.append(rank)
        if kind:
            return ranks, "stem" if "patch" in path else kind
    last = path.rpartition(".")[2]
    if _is_in_block(path):
        return [*ranks, _BLOCKS], ""
    if "conv" in last and "transition" not in path:
        return [*ranks, _BEFORE_BLOCKS], ""
    return [*ranks, _AFTER_BLOCKS if re.fullmatch(r"(dense|linear|fc|out)_?\d*", last) else _BLOCKS], ""


def _within(path: str, *, with_experts: bool) -> tuple[str, int]:
    """Return type and place of a layer in its block; an empty type where the table has none."""
    attention = r"\w*att(n|ention)\w*"
    if with_experts and re.search(r"(^|\.)gate$", path) and "expert" not in path:
        return "router", 10
    found = (row for row in _WITHIN if re.fullmatch(rf"(.*\.)?({row[2].replace('@', attention)})", path))
    kind, place, _ = next(found, ("", _UNKNOWN, ""))
    if kind == "down" and re.search(rf"(^|\.){attention}\.(.*\.)?(wo|c_proj|output\.dense)$", path):
        kind, place = "o", 4
    if kind and re.search(rf"(^|\.)({_CROSS})\.", path):
        return f"cross {kind}", place + 4
    if kind != "router" and re.search(rf"(^|\.)({_SHARED})(\.|$)", path):
        return f"shared {kind}" if kind else "", place + 20
    if kind != "router" and re.search(rf"(^|\.)({_EXPERTS})(\.|$)", path):
        return f"expert {kind}" if kind else "", place + 30
    return kind, place


def _type(name: str, kernel: int, *, with_experts: bool) -> str:
    path = _path(name)
    _, kind = _around(path)
    if not kind and _is_in_block(path):
        kind, _ = _within(path, with_experts=with_experts)
    if kernel == 1:
        return "depthwise"
    if kernel:
        return "stem" if kind == "embedding" else kind if kind in _OF_KERNELS else "conv"
    return kind or _last_word(path)


def _is_in_block(path: str) -> bool:
    return any(map(_is_numbered, path.split("."))) or bool(
        re.search(r"att(n|ention)|mlp|ffn|layers?\b|weight_(ih|hh)", path)
    )


def _last_word(path: str) -> str:
    words = [word for part in path.split(".") if (word := re.sub(r"[\d_]+$", "", part))]
    return words[-1] if words else "dense"


def _depth(name: str, *, with_experts: bool) -> tuple[Any, ...]:
    """Return a sort key: what comes before and after the blocks, the block, and the place in it, number by number."""
    path, block = _path(name), block_of(name)
    ranks, kind = _around(path)
    if kind:
        return ranks, re.search(r"pos|type|decoder", path) is not None, natural_key(name)
    inner = path.removeprefix(_path(block)).strip(".") if block != name else path
    block = block if block != name else module_of(name)
    parts = []
    for words, number in re.findall(r"(.*?)(?:^|\.|$)(\d+(?=\.|$)|$)", inner):
        _, place = _within(words.strip("."), with_experts=with_experts)
        if "stage" in block and place == 40:  # stages begin with it, blocks end with it
            place = -1
        parts.append((place, natural_key(words), int(number or 0)))
    # DenseNet has its transitions between its blocks, by their numbers.
    return ranks, False, natural_key(block.replace("transition", "denseblock")), parts, natural_key(name)
