"""Where text comes from: the papers' data sets by name, or a local file.

`.npy` and `.npz` are token ids (in an npz under the key "ids"); for all others see `documents`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from farms_jax.errors import InputError, listed, one_line, printable, short_repr
from farms_jax.programs import files

from . import hub
from .documents import KINDS, read_documents, some_documents

NAMED = ("wikitext2", "c4")
_IDS = (".npy", ".npz")
# The reference evaluates on the first documents of C4's validation split.
_C4_DOCUMENTS = 1100

Flag = Literal["--calibration", "--recover-text", "--text"]


class Source(NamedTuple):
    """Text or token ids, not cut into samples yet."""

    kind: Literal["text", "documents", "tokens"]  # documents are complete in themselves
    texts: Sequence[str]  # the text, or the documents; empty for token ids
    ids: np.ndarray | None = None  # integer (N, T) or (N,); None for text
    sha256: str = ""  # of the file; of a named data set's texts, joined by blank lines


def read(source: str, flag: Flag) -> Source:
    """Return the content of "wikitext2", "c4", or a file, as given to one of the options.

    Of a data set `--text` takes the split that the papers evaluate on, the others the training split.

    Raises:
        InputError: it cannot be read, has another format than its name says, or is empty.
    """
    if source in NAMED:
        return _read_named(source, flag)
    path, where = files.expanded(source), f"{flag} {source}"
    if path.is_dir():
        inside = listed(some_documents(path), 3, ", ")
        raise InputError(f"{where}: is a folder; give one file of it{f', such as {inside}' if inside else ''}")
    if not path.is_file():
        raise InputError(f"{where}: no such file; give a file ({KINDS}), or one of {', '.join(NAMED)}")
    try:
        is_ids = path.suffix.lower() in _IDS
        found = _read_tokens(path, where) if is_ids else Source(*read_documents(path, where))
        if not any(text.strip() for text in found.texts) and found.ids is None:
            raise InputError(f"{where}: holds no text; give another file")
        return found._replace(sha256=files.sha256(path))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or one_line(error)}); check the file") from error


def are_token_ids(*sources: str) -> bool:
    """Return whether all sources, by their names, are files of token ids, which need no tokenizer."""
    return all(Path(source).suffix.lower() in _IDS for source in sources)


def _read_named(name: str, flag: Flag) -> Source:
    """Return the part of a data set that the reference uses, with lines and documents joined as there."""
    calibrate = flag != "--text"
    if name == "wikitext2":
        split, joint = ("train", " ") if calibrate else ("test", "\n\n")
        lines = hub.load(flag, name, "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
        kind, texts = "text", [joint.join(lines)]
    else:
        split, shard = ("train", "00000-of-01024") if calibrate else ("validation", "00000-of-00008")
        shards = {split: f"en/c4-{split}.{shard}.json.gz"}
        documents = hub.load(flag, name, "allenai/c4", data_files=shards, split=split)["text"]
        kind, texts = ("documents", documents) if calibrate else ("text", [" ".join(documents[:_C4_DOCUMENTS])])
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(("\n\n" if number else "").encode() + text.encode())
    return Source(kind, texts, sha256=digest.hexdigest())


def _read_tokens(path: Path, where: str) -> Source:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            ids = found if isinstance(found, np.ndarray) else found["ids"]
            if not isinstance(ids, np.ndarray) or (ids is found and file.read(1)):
                raise ValueError("no array, or more than one")
    except OSError:
        raise
    except Exception as error:  # its type depends on where the file is damaged
        raise InputError(
            f'{where}: no token ids ({one_line(error)}); write them with numpy.save, or with numpy.savez as "ids"'
        ) from error
    if ids.dtype.kind not in "iu" or ids.ndim not in {1, 2} or not ids.size:
        raise InputError(
            f"{where}: token ids must be integers of shape (samples, length) or (tokens,), "
            f"got {printable(str(ids.dtype))} {short_repr(ids.shape)}; save them as such"
        )
    return Source("tokens", (), ids)
