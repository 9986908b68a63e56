"""A tokenizer made from the metadata of a GGUF file, with the `tokenizers` package.

Two kinds exist: byte-level BPE ("gpt2"), whose file names the rule that cuts text into words, and sentencepiece BPE
("llama"), whose file has a score per token instead of a list of merges.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from farms_jax.errors import InputError, short_repr

from ..tokenizing import check_tokenizer, tokenizer_faults

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types of the format
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Words(NamedTuple):
    """How text is cut before merging: each pattern in turn is applied to the pieces, and each match becomes a piece."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token needs no merges
    add_bos: bool = False  # the default, where the file does not say
    nfc: bool = False  # Unicode's composed form, before the text is cut


# By `tokenizer.ggml.pre`. Where llama.cpp and a model's own tokenizer.json disagree (NFC), the latter is followed.
_WORDS = {
    "default": _Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Words((_GPT2,)),
    "smollm": _Words((r"\p{N}", _GPT2)),
    "qwen2": _Words((_LLAMA3.replace("{1,3}", ""),), nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Words((_LLAMA3,), whole_words=True, add_bos=True)),
}
_OTHER = "give its tokenizer as a Hugging Face folder with --tokenizer PATH"


def make_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """Make a `PreTrainedTokenizerFast` from a file's metadata, long arrays included; `where` names the file."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{where}: tokenizer.ggml.model {short_repr(kind)} is not one of gpt2, llama; {_OTHER}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens is missing, or has a token twice; {_OTHER}")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    with tokenizer_faults(f"{where}: its tokenizer is damaged", _OTHER):
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(metadata, tokens, where)
        else:
            tokenizer, add_bos = _sentencepiece(metadata, tokens, types, where), True
        # These are matched in any text before it is cut.
        tokenizer.add_tokens([
            AddedToken(token, normalized=False, special=token_type == _CONTROL)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in {_CONTROL, _USER_DEFINED}
        ])
        special = {}
        for role, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
            if (number := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                special[f"{role}_token"] = tokens[number]
        _add_ends(tokenizer, special, metadata, add_bos=add_bos)
        wrapped = _wrap(tokenizer, special, metadata)
        check_tokenizer(wrapped)
    return wrapped


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> tuple[Tokenizer, bool]:
    """Return the tokenizer, and whether texts get a first BOS by default."""
    rule = metadata.get("tokenizer.ggml.pre")
    if not isinstance(rule, str) or rule not in _WORDS:
        raise InputError(f"{where}: tokenizer.ggml.pre {short_repr(rule)} is not one of {', '.join(_WORDS)}; {_OTHER}")
    words = _WORDS[rule]
    # Not split(" "): the first half may begin with a space.
    merges = [
        (merge[:at], merge[at + 1 :]) for merge in metadata["tokenizer.ggml.merges"] if (at := merge.find(" ", 1))
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.whole_words))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.scores is missing or too short; {_OTHER}")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=_merges_of_scores(tokens, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # Sentencepiece puts one more space before the text, whatever it begins with.
    tokenizer.normalizer = normalizers.Sequence([
        *([normalizers.Prepend("▁")] if prefix else []),
        normalizers.Replace(" ", "▁"),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ])
    return tokenizer


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Turn scores into merges: sentencepiece joins the neighbours whose union has the highest score."""
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    merges = [
        (-score, token[:at], token[at:])
        for token, score in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_ends(tokenizer: Tokenizer, special: Mapping[str, str], metadata: Mapping[str, Any], *, add_bos: bool) -> None:
    begin = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    end = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = [token for token in (begin, end) if token is not None]
    if not ends:
        return
    before, after = [f"{begin}:0"] if begin else [], [f"{end}:0"] if end else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *before, "$B:0", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends)],
    )


def _wrap(tokenizer: Tokenizer, special: Mapping[str, str], metadata: Mapping[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        **special,
    )
    template = metadata.get("tokenizer.chat_template")
    wrapped.chat_template = template if isinstance(template, str) else None
    return wrapped
