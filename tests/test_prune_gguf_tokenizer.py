"""Tokenizers made from the metadata of GGUF files, against the `tokenizers` package and the rules written out."""

import numpy as np
import pytest
from prune_helpers import DATA, TEXT, byte_level_metadata, trained_tokenizer
from tokenizers import pre_tokenizers

from farms_jax.errors import InputError
from prune.checkpoints import open_tokenizer
from prune.checkpoints.base import save_tokenizer
from prune.checkpoints.gguf_tokenizer import make_tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    ("rule", "pre_tokenizer"), [("gpt-2", BYTES), ("smollm", pre_tokenizers.Sequence([DIGITS, BYTES]))]
)
def test_byte_level_ids_are_those_of_the_original(rule, pre_tokenizer):
    theirs, merges, tokens = trained_tokenizer(pre_tokenizer)
    ours = make_tokenizer(byte_level_metadata(rule, merges, tokens), "made")
    for text in (TEXT, (DATA / "README.md").read_text(), " ", "", "\n\n a"):
        ids = ours(text)["input_ids"]
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("gpt-2", "He|'s| 12345| $|9|.|99| I|'|LL|\n\n| go"),
        ("smollm", "He|'s| |1|2|3|4|5| $|9|.|9|9| I|'|LL|\n\n| go"),
        ("llama-bpe", "He|'s| |123|45| $|9|.|99| I|'LL|\n\n| go"),
        ("qwen2", "He|'s| |1|2|3|4|5| $|9|.|9|9| I|'LL|\n\n| go"),
        ("default", "He|'|s| |123|45| |$|9|.|99| I|'|LL|\n\n| go"),
    ],
)
def test_words_are_cut_as_the_rule_says(rule, words):
    ours = make_tokenizer(byte_level_metadata(rule), "made")
    cut = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("He's 12345 $9.99 I'LL\n\n go")
    assert "|".join(word for word, _ in cut).replace("Ġ", " ").replace("Ċ", "\n") == words


def test_whole_words_need_no_merges_where_the_rule_says():
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "whole"]
    number = tokens.index("whole")
    plain = make_tokenizer(byte_level_metadata("gpt-2", tokens=tokens), "made")
    llama = make_tokenizer(byte_level_metadata("llama-bpe", tokens=tokens), "made")
    assert number not in plain("whole", add_special_tokens=False)["input_ids"]
    assert llama("whole", add_special_tokens=False)["input_ids"] == [number]


@pytest.mark.parametrize(
    ("rule", "flags", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_begin_and_end_are_added_as_the_file_says(tmp_path, rule, flags, begins, ends):
    ours = make_tokenizer(byte_level_metadata(rule, **flags), "made")
    assert (ours.bos_token, ours.eos_token) == ("<|begin|>", "<|end|>")
    ours.save_pretrained(tmp_path)
    for tokenizer in (ours, open_tokenizer(str(tmp_path))):
        plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
        expected = [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends
        assert tokenizer("ab")["input_ids"] == expected


def test_added_tokens_are_matched_whole():
    ours = make_tokenizer(byte_level_metadata("gpt-2"), "made")
    ids = ours("a<|end|>b  <think>")["input_ids"]
    assert ids == [ours.convert_tokens_to_ids("a"), 256, ours.convert_tokens_to_ids("b"), 258]
    assert ours.decode(ids, skip_special_tokens=True) == "ab  <think>"


def sentencepiece_metadata(seed=0, **more):
    """A made-up sentencepiece vocabulary: pieces of TEXT with scores of their own, and all bytes."""
    rng = np.random.default_rng(seed)
    text = "▁" + TEXT.replace(" ", "▁").replace("🙂", "")  # left to the bytes
    pieces = {text[at : at + length] for length in (2, 3, 4) for at in range(0, len(text), 2)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(pieces | set(text))]
    scores = rng.permutation(len(tokens)).astype(float) - len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores.tolist(),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def merged_by_score(text, metadata):
    """Sentencepiece's rule, one merge at a time: the neighbours whose union scores highest, the leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    pieces = list(text)
    while True:
        found = [
            (-scores[ids[union]], at)
            for at, union in enumerate(map("".join, zip(pieces, pieces[1:], strict=False)))
            if union in ids and types[ids[union]] == 1
        ]
        if not found:
            break
        at = min(found)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    numbers = []
    for piece in pieces:
        numbers += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return numbers


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_ids_follow_the_scores(seed):
    metadata = sentencepiece_metadata(seed)
    ours = make_tokenizer(metadata, "made")
    for text in (TEXT, " two  spaces ", "🙂", "x"):
        ids = ours(text)["input_ids"]
        assert ids[0] == 1
        assert ids[1:] == merged_by_score("▁" + text.replace(" ", "▁"), metadata)
        assert ours.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_without_a_space_before_the_text():
    metadata = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    ours = make_tokenizer(metadata, "made")
    assert ours("It's")["input_ids"] == merged_by_score("It's", metadata)


@pytest.mark.parametrize("metadata", [byte_level_metadata("smollm"), sentencepiece_metadata()])
def test_saved_tokenizers_are_the_same(tmp_path, metadata):
    ours = make_tokenizer(metadata | {"tokenizer.chat_template": "{{ messages }}"}, "made")
    save_tokenizer(ours, tmp_path / "export")
    again = open_tokenizer(str(tmp_path / "export"))
    assert again(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert again.chat_template == "{{ messages }}"
    assert again.eos_token_id == ours.eos_token_id


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model None is not one of gpt2, llama"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5' is not one of gpt2, llama"),
        (byte_level_metadata("jais-7"), "tokenizer.ggml.pre 'jais-7' is not one of default, gpt-2, smollm"),
        (byte_level_metadata("gpt-2", tokens=["a", "a"]), "has a token twice"),
        (byte_level_metadata("gpt-2", merges=["a missing"]), "its tokenizer is damaged"),
        (byte_level_metadata("gpt-2", bos_token_id=10**6), "its tokenizer is damaged"),
        (byte_level_metadata("gpt-2", token_type=[1]), "its tokenizer is damaged"),
        (sentencepiece_metadata(scores=[0.0]), "tokenizer.ggml.scores is missing or too short"),
    ],
)
def test_an_unusable_tokenizer_names_the_flag(metadata, message):
    with pytest.raises(InputError, match=rf"made: .*{message}.*--tokenizer PATH"):
        make_tokenizer(metadata, "made")
