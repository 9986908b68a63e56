"""Tokens are those of a folder's `tokenizer.json`, whatever class its config names; an export gives the same."""

import json

import numpy as np
import pytest
from prune_helpers import config_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from prune.checkpoints import open_tokenizer
from prune.checkpoints.base import save_tokenizer
from prune.checkpoints.folder_tokenizer import declare_own_rule
from prune.tokenizing import encode

TEXT = "In 2024 there were 7650841823 OF them.  def add(a, b):\n    return a + b  # Über café, x\u0301y\r\n\n" * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA3 = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def trained(model, trainer, *, normalizer=None, words=None, decoder=None, ends=None):
    """A tokenizer of `tokenizers`, trained on the text."""
    made = Tokenizer(model)
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, words, decoder
    made.train_from_iterator([TEXT, " ".join(map(str, range(300)))], trainer)
    if ends:
        number = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return made


def byte_level(words, normalizer=None, **more):
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return trained(models.BPE(), trainer, words=words, normalizer=normalizer, decoder=decoders.ByteLevel(), **more)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(**more):
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made = trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        words=pre_tokenizers.Split("▁", "merged_with_next"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        **more,
    )
    made.pre_tokenizer = None
    return made


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, words=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    model, lower = models.WordPiece(unk_token="<unk>"), normalizers.Lowercase()
    return trained(model, trainer, words=pre_tokenizers.Whitespace(), normalizer=lower)


def folder_of(path, made, model_type, settings):
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(config_of("llama_tiny", model_type=model_type)))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


CASES = {
    "llama of gpt2's class, threes of digits": (lambda: byte_level(split(LLAMA3)), "llama", "GPT2Tokenizer"),
    "qwen2 that is sentencepiece": (sentencepiece, "qwen2", "PreTrainedTokenizerFast"),
    "qwen2 without a class": (lambda: byte_level(split(LLAMA3)), "qwen2", None),
    "qwen3 in lower case": (
        lambda: byte_level(split(r" ?\w+|\s+|[^\s\w]+"), normalizers.Lowercase()),
        "qwen3",
        "Qwen2Tokenizer",
    ),
    "mistral of llama's class, byte level": (lambda: byte_level(split(LLAMA3), ends=True), "mistral", "LlamaTokenizer"),
    "llama of llama's class": (lambda: sentencepiece(ends=True), "llama", "LlamaTokenizerFast"),
    "opt of gpt2's class, digits one by one": (
        lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
        "opt",
        "GPT2TokenizerFast",
    ),
    "llama, unigram": (unigram, "llama", "LlamaTokenizer"),
    "llama, words": (wordpiece, "llama", "BertTokenizer"),
    "a class of the folder's own code": (lambda: byte_level(split(LLAMA3)), "llama", "OwnTokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_tokenizer_json_here_and_in_an_export(tmp_path, case):
    make, model_type, name = CASES[case]
    own = make()
    code = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}} if name == "OwnTokenizer" else {}
    folder = folder_of(tmp_path / "source", own, model_type, ({"tokenizer_class": name} if name else {}) | code)

    def assert_same(tokenizer):
        for ends in (False, True):
            expected = own.encode(TEXT, add_special_tokens=ends).ids
            np.testing.assert_array_equal(encode(tokenizer, TEXT, special_tokens=ends), expected)

    used = open_tokenizer(str(folder))
    assert_same(used)
    assert (used.bos_token, used.eos_token) == ("<s>", "</s>")
    declare_own_rule(folder)
    assert_same(AutoTokenizer.from_pretrained(folder))
    # Given for another model, it is written beside that model's config.
    other = folder_of(tmp_path / "other", byte_level(split(r"\s+")), "qwen2", {})
    save_tokenizer(used, other)
    assert_same(AutoTokenizer.from_pretrained(other))
    assert_same(open_tokenizer(str(other)))


def test_what_is_used_is_said_and_a_class_with_the_file_s_rule_stays(tmp_path, caplog):
    folder = folder_of(tmp_path / "gpt2", byte_level(split(LLAMA3)), "llama", {"tokenizer_class": "GPT2Tokenizer"})
    open_tokenizer(str(folder))
    assert "the tokens are those of tokenizer.json: its class GPT2Tokenizer gives other tokens" in caplog.text
    caplog.clear()
    folder = folder_of(tmp_path / "plain", byte_level(split(LLAMA3)), "llama", {"tokenizer_class": "LlamaTokenizer"})
    before = (folder / "tokenizer_config.json").read_bytes()
    open_tokenizer(str(folder))
    declare_own_rule(folder)
    assert (caplog.text, (folder / "tokenizer_config.json").read_bytes()) == ("", before)
