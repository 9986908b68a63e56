"""Text and tokenizer of the small model's training: a few plain files in, four texts and a byte-level BPE out."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from farms_jax.errors import InputError

END = "<|endoftext|>"  # stands before every article

_ARTICLE = re.compile(r"^= [^=\n]+ =$", re.MULTILINE)  # a title of the first level, as WikiText has them
_LINE = re.compile(r"^", re.MULTILINE)
# WikiText splits words and signs by spaces; each of these takes some back.
_SPACES = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?)\]%]|'\w+|n't\b)"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"\s*\n\s*"), "\n"),
)


class Corpus(NamedTuple):
    """Texts of one training; `calibration` is a part of `training`, the others are apart."""

    training: str
    validation: str
    calibration: str
    heldout: str


def clean(text: str) -> str:
    r"""Undo WikiText's splitting of words and signs, and drop empty lines.

    >>> clean(' The ( " first " ) of 3 @,@ 000 , he said . \n \n Next\n')
    'The ("first") of 3,000, he said.\nNext\n'

    Args:
        text: word by word, or plain, which stays nearly as it is.

    Returns:
        Plain text.
    """
    for pattern, replacement in _SPACES:
        text = pattern.sub(replacement, text)
    return text.strip() + "\n"


def read_corpus(paths: Sequence[Path], heldout: int, validation: int, calibration: int) -> Corpus:
    """Read text files and cut the parts that are not trained on from the end of the last.

    Args:
        paths: UTF-8 files, in order.
        heldout: bytes of the held-out text at least, the very end.
        validation: bytes of the validation text at least, before it.
        calibration: bytes of the calibration text at least, before that; it stays in the training text.

    Returns:
        The texts; each begins with an article, or with a line where there are no articles.

    Raises:
        InputError: a file is not there, is not UTF-8, or the last one is too short.
    """
    texts = []
    for path in paths:
        try:
            texts.append(clean(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise InputError(f"--text: there is no file {path}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--text: {path} is not UTF-8 text ({error})") from error
    if not texts:
        raise InputError("--text: no file given")
    rest, kept_out = _cut(texts[-1], heldout, paths[-1])
    rest, chosen_by = _cut(rest, validation, paths[-1])
    _, calibrated_on = _cut(rest, calibration, paths[-1])
    return Corpus("".join([*texts[:-1], rest]), chosen_by, calibrated_on, kept_out)


def _cut(text: str, size: int, path: Path) -> tuple[str, str]:
    """Text before and from the last article (or line) that leaves at least `size` bytes behind it."""
    for boundary in (_ARTICLE, _LINE):
        for start in reversed([match.start() for match in boundary.finditer(text)][1:]):
            if len(text[start:].encode()) >= size:
                return text[:start], text[start:]
    raise InputError(
        f"--text: {path} is too short for {size} bytes beside the training text; lower --heldout-bytes etc."
    )


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, so that every text has tokens.

    Args:
        text: to learn from.
        vocab_size: tokens at most, the 256 bytes and `END` among them.

    Returns:
        The tokenizer; it adds no special tokens of itself.

    Raises:
        InputError: the vocabulary cannot even hold the bytes.
    """
    if vocab_size < 257:
        raise InputError(f"--vocab-size must be at least 257, the bytes and {END}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Tokenise a text, with `END` before every article.

    Args:
        tokenizer: of `train_tokenizer`.
        text: any.

    Returns:
        Shape (N,), int32.
    """
    starts = [0, *(match.start() for match in _ARTICLE.finditer(text) if match.start()), len(text)]
    articles = [text[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)]
    end = tokenizer.token_to_id(END)
    return np.array([token for found in tokenizer.encode_batch(articles) for token in (end, *found.ids)], np.int32)
