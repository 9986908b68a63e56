"""Encoding of text, and errors of tokenizers: whatever the packages raise becomes one error that names the file."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from farms_jax.errors import InputError, one_line

_GAPS = 1_000_000  # most ids without a token, beside ten for each token


@contextlib.contextmanager
def tokenizer_faults(what: str, remedy: str) -> Generator[None]:
    """Turn any error inside into an InputError: `what` cannot be done with which file, why, and the `remedy`."""
    try:
        yield
    except BaseException as error:  # these packages promise no type, and an error of Rust is no `Exception`
        if isinstance(error, InputError | KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise InputError(f"{what} ({one_line(error)}); {remedy}") from error


def check_tokenizer(tokenizer: Any) -> None:
    """Find faults that show only in use, where some of them would end the process.

    Raises:
        ValueError: its ids have huge gaps: `tokenizers` allocates memory for all ids up to the highest.
    """
    check_ids(tokenizer.get_vocab())
    encode(tokenizer, "a")


def check_ids(vocab: Mapping[str, int]) -> None:
    """Raise a ValueError where the ids of a vocabulary have huge gaps."""
    if max(vocab.values(), default=0) > _GAPS + 10 * len(vocab):
        raise ValueError(f"{len(vocab)} tokens have ids up to {max(vocab.values())}")


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> np.ndarray:
    """Return the token ids (N,), int64, of a text; with `special_tokens`, those that the tokenizer adds by default."""
    # verbose: it would warn of every text that is longer than the model's positions.
    return np.asarray(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"], np.int64)
