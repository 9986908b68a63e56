"""Where text comes from: the papers' data sets by name, or a local file.

A file's name tells its format: `.jsonl` (an object with a "text" per line), `.parquet` (a column "text"), `.npy` and
`.npz` (token ids, in an npz under the key "ids"); any other is UTF-8 text.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from farms_jax._extras import from_extra
from farms_jax.errors import InputError, listed, one_line, printable, short_repr
from farms_jax.programs import files

from . import hub

NAMED = ("wikitext2", "c4")
_IDS = (".npy", ".npz")
# The reference evaluates on the first documents of C4's validation split.
_C4_DOCUMENTS = 1100

Flag = Literal["--calibration", "--text"]


class Source(NamedTuple):
    """Text or token ids, not cut into samples yet."""

    kind: Literal["text", "documents", "tokens"]  # documents are complete in themselves
    texts: Sequence[str]  # the text, or the documents; empty for token ids
    ids: np.ndarray | None = None  # integer (N, T) or (N,); None for text
    sha256: str = ""  # of the file; of a named data set's texts, joined by blank lines


def read(source: str, flag: Flag) -> Source:
    """Return the content of "wikitext2", "c4", or a file, as given to one of the options.

    Of a data set `--calibration` takes the training split, `--text` the one that the papers evaluate on.

    Raises:
        InputError: it cannot be read, has another format than its name says, or is empty.
    """
    if source in NAMED:
        return _read_named(source, flag)
    path, where = files.expanded(source), f"{flag} {source}"
    if path.is_dir():
        raise InputError(f"{where}: is a folder; give one file of it")
    if not path.is_file():
        raise InputError(f"{where}: no such file; give a file, or one of {', '.join(NAMED)}")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, **dict.fromkeys(_IDS, _read_tokens)}
    try:
        found = readers.get(path.suffix.lower(), _read_text)(path, where)
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
    calibrate = flag == "--calibration"
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


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text (byte {content[error.start]:#04x} at {error.start}); convert it to UTF-8, "
            "or give .jsonl, .parquet, or token ids in .npy or .npz"
        ) from error


def _read_text(path: Path, where: str) -> Source:
    # Not Path.read_text, which would turn "\r\n" into "\n".
    return Source("text", [_decode(path.read_bytes(), where)])


def _read_jsonl(path: Path, where: str) -> Source:
    # Not splitlines, which splits at characters that JSON allows inside a string.
    lines = _decode(path.read_bytes(), where).split("\n")
    texts = [_text_of(line, f"{where}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return Source("documents", texts)


def _text_of(line: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({one_line(error)}); correct or remove it") from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} is not an object with a string "text"; correct or remove it')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half of a pair of UTF-16, which is no letter; correct or remove it") from error
    return text


def _read_parquet(path: Path, where: str) -> Source:
    with from_extra("prune", where):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get("text") not in {"string", "large_string", "string_view"}:
                have = listed((f"{printable(name)} ({printable(kind)})" for name, kind in columns.items()), 12, ", ")
                raise InputError(f'{where}: needs a column "text" of strings, has {have}; rename the text column')
            texts = file.read(columns=["text"])["text"].to_pylist()
            return Source("documents", [text for text in texts if text is not None])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a readable parquet file ({one_line(error)}); download it again") from error


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
