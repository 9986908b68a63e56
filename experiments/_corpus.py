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


def read_corpus(paths: Sequence[Path], *, heldout: int, validation: int, calibration: int) -> Corpus:
    """Read text files, and cut the parts that are not trained on from the end of the last.

    Args:
        paths: UTF-8 files, in order.
        heldout: minimum bytes of the held-out text, the very end.
        validation: minimum bytes of the validation text, before it.
        calibration: minimum bytes of the calibration text, before that; it stays in the training text.

    Returns:
        The texts; each begins with an article, or with a line where there are no articles.

    Raises:
        InputError: the last file is too short.
    """
    *texts, last = [clean(path.read_text(encoding="utf-8")) for path in paths]
    last, heldout_text = _split_end(last, heldout)
    last, validation_text = _split_end(last, validation)
    _, calibration_text = _split_end(last, calibration)
    return Corpus("".join([*texts, last]), validation_text, calibration_text, heldout_text)


def _split_end(text: str, size: int) -> tuple[str, str]:
    """Split at the last article (or line) that has at least `size` bytes from there to the end."""
    for boundary in (_ARTICLE, _LINE):
        for start in reversed([match.start() for match in boundary.finditer(text)][1:]):
            if len(text[start:].encode()) >= size:
                return text[:start], text[start:]
    raise InputError(f"--text: the last file is too short for {size} bytes apart; lower --heldout-bytes etc.")


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, so that every text has tokens.

    Args:
        text: to learn from.
        vocab_size: maximum number of tokens, the 256 bytes and `END` among them.

    Returns:
        The tokenizer; it adds no special tokens of itself.
    """
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
    """Return the tokens of a text (N,), int32, with `END` before every article."""
    starts = [0, *(match.start() for match in _ARTICLE.finditer(text) if match.start()), len(text)]
    articles = [text[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)]
    end = tokenizer.token_to_id(END)
    return np.array([token for found in tokenizer.encode_batch(articles) for token in (end, *found.ids)], np.int32)
