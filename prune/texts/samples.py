"""Token samples: random windows to calibrate on, blocks of a whole text to evaluate on, and where each came from.

    samples = calibration_samples("wikitext2", tokenizer, count=128, length=2048, seed=0)
    blocks = evaluation_blocks("held_out.txt", tokenizer, length=2048)
    samples.ids       # (128, 2048) int32
    samples.record    # hashes and positions: what a perplexity depends on

Cut as the public code of Wanda and FARMS cuts: a text is tokenised once as a whole, calibration windows lie at random
positions of it, evaluation blocks follow one another. Of documents (C4, `.jsonl`, `.parquet`) a window lies inside one.
The positions are drawn by NumPy, so they are not those that `random.seed` gives the reference.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from farms_jax.errors import InputError

from .. import tokenizing
from ..tokenizing import tokenizer_faults
from .sources import Flag, Source, read

_log = logging.getLogger(__name__)

_C4_BLOCKS = 256  # of C4 that the reference evaluates on

_Encode = Callable[[str], np.ndarray]
# Token ids (N, T), their positions, and the number of tokens in the source, or in the part of it that was read.
_Drawn = tuple[np.ndarray, Sequence[Any], int]


class Samples(NamedTuple):
    """Token sequences of one length.

    Attributes:
        ids: token ids (N, T), int32.
        record: facts for a run card, JSON-ready: `source` as given; `kind` ("text", "documents" or "tokens");
            `text_sha256` of the file, or of a named data set's text; `ids_sha256` of `ids` as little-endian int32;
            `tokens`, the number read; `positions` of the samples (in the text, as [document, start], or as rows of a
            token file); `count`, `length`, `seed`; `special_tokens`; `tokenizer_sha256`.
    """

    ids: np.ndarray
    record: dict[str, Any]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return the SHA-256 of a fast tokenizer's whole definition; `None` for a slow one or none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()


def calibration_samples(
    source: str,
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    special_tokens: bool = True,
    vocab_size: int,
    held_out: int = 0,
    flag: Flag = "--calibration",
) -> Samples:
    """Return samples (count, length) at random positions of a text; the same arguments give the same ones.

    The last `held_out` of them do not change the others. In one text they share as few tokens as can be with these and
    with each other; of documents they are other ones, until all were used.

    `source` is "wikitext2", "c4" (their training splits), or the path of a file, see `prune.texts.sources`; a token
    file of shape (N, length) is taken as it is, from its first row on, and needs no tokenizer. With `special_tokens`
    the tokenizer, one of `transformers`, adds those that it adds by default, such as a first BOS. Errors name `flag`.

    Raises:
        InputError: the source cannot be read, is too short, or has ids outside the vocabulary.
    """
    where, found = f"{flag} {source}", read(source, flag)
    encode, random, drawn = _encoder(tokenizer, special_tokens, where), np.random.default_rng(seed), None
    if found.ids is not None and found.ids.ndim == 2 and found.ids.shape[1] == length:
        if len(found.ids) < count:
            raise InputError(f"{where}: has {len(found.ids)} sequences, {count} are asked for; ask for fewer")
        drawn = (found.ids[:count], range(count), found.ids.size)
    elif found.kind == "documents":
        drawn = _windows_of_documents(found.texts, encode, random, count, length)
        if drawn is None:
            _log.warning("%s: no document is longer than %d tokens; they are put into one text", where, length)
    if drawn is None:
        ids = _whole(found, encode, length, where)
        starts = random.integers(0, len(ids) - length, size=count - held_out, endpoint=True).tolist()
        starts += _held_out_starts(starts, held_out, length, len(ids), random)
        drawn = (np.stack([ids[start : start + length] for start in starts]), starts, len(ids))
    facts = {"source": source, "count": count, "length": length, "seed": seed, "special_tokens": special_tokens}
    return _samples(drawn, found, tokenizer, vocab_size, where, facts)


def evaluation_blocks(
    source: str,
    tokenizer: Any,
    *,
    length: int,
    limit: int | None = None,
    special_tokens: bool = True,
    vocab_size: int,
) -> Samples:
    """Return a whole tokenised text in blocks (N, length) that follow one another, without the rest after the last.

    Documents, and rows of a token file, are first put into one text. Arguments are those of `calibration_samples`, but
    the source is WikiText-2's test split or the start of C4's validation split; `limit` is the most blocks taken.
    """
    where, found = f"--text {source}", read(source, "--text")
    ids = _whole(found, _encoder(tokenizer, special_tokens, where), length, where)
    blocks = min(len(ids) // length, limit or len(ids), _C4_BLOCKS if source == "c4" else len(ids))
    drawn = (ids[: blocks * length].reshape(blocks, length), range(0, blocks * length, length), len(ids))
    facts = {"source": source, "count": blocks, "length": length, "seed": None, "special_tokens": special_tokens}
    return _samples(drawn, found, tokenizer, vocab_size, where, facts)


def _samples(
    drawn: _Drawn, found: Source, tokenizer: Any, vocab_size: int, where: str, facts: dict[str, Any]
) -> Samples:
    ids, positions, tokens = drawn
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong, top = (low if low < 0 else high), vocab_size - 1
        raise InputError(f"{where}: token id {wrong} is outside the model's vocabulary (0 to {top}); use its tokenizer")
    ids = np.ascontiguousarray(ids, np.int32)
    record = {
        **facts,
        "kind": found.kind,
        "text_sha256": found.sha256,
        "ids_sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        "tokens": tokens,
        "positions": list(positions),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
    }
    return Samples(ids, record)


def _encoder(tokenizer: Any, special_tokens: bool, where: str) -> _Encode:
    def encode(text: str) -> np.ndarray:
        with tokenizer_faults(f"{where}: the tokenizer cannot take this text", "give another with --tokenizer PATH"):
            return tokenizing.encode(tokenizer, text, special_tokens=special_tokens)

    return encode


def _whole(found: Source, encode: _Encode, length: int, where: str) -> np.ndarray:
    """Return all tokens (N,) as one text; InputError where N is below `length`."""
    # Joined as the lines of WikiText-2's test split are.
    ids = encode("\n\n".join(found.texts)) if found.ids is None else found.ids.reshape(-1)
    if len(ids) < length:
        remedy = f"give --length {len(ids)} or less, or more text" if len(ids) > 1 else "give more text"
        raise InputError(f"{where}: has {len(ids)} tokens, fewer than one sequence of {length}; {remedy}")
    return ids


def _held_out_starts(
    starts: Sequence[int], count: int, length: int, tokens: int, random: np.random.Generator
) -> list[int]:
    """Return random positions whose windows share the fewest tokens with those at `starts` and with each other."""
    used, found = np.zeros(tokens, np.int64), []
    for start in starts:
        used[start : start + length] += 1
    for _ in range(count):
        before = np.concatenate([[0], np.cumsum(used)])
        shared = before[length:] - before[:-length]
        start = int(random.choice(np.flatnonzero(shared == shared.min())))
        used[start : start + length] += 1
        found.append(start)
    return found


def _windows_of_documents(
    documents: Sequence[str], encode: _Encode, random: np.random.Generator, count: int, length: int
) -> _Drawn | None:
    """Return one window of each document before a second of any; `None` where none is longer than a window."""
    long, tokens = [], 0
    with tqdm(total=count, desc="calibration samples", leave=False) as bar:
        # The reference draws until a document is long enough, and would never end where none is.
        for document in map(int, random.permutation(len(documents))):
            ids = encode(documents[document])
            tokens += len(ids)
            if len(ids) > length:
                long.append((document, ids))
                bar.update()
            if len(long) == count:
                break
    if not long:
        return None
    chosen = [long[number % len(long)] for number in range(count)]
    starts = [int(random.integers(0, len(ids) - length, endpoint=True)) for _, ids in chosen]
    windows = [ids[start : start + length] for (_, ids), start in zip(chosen, starts, strict=True)]
    positions = [[document, start] for (document, _), start in zip(chosen, starts, strict=True)]
    return np.stack(windows), positions, tokens
