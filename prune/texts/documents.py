"""Documents in files of every usual kind, told by name and content; what is none of them is refused, not read as text.

    read_documents(Path("c4-train.00000-of-01024.json.gz"), "--calibration FILE")     # ("documents", [...])

JSON (an array, one object, or an object a line), CSV, parquet and Arrow have their documents under "text"; all else is
one plain text. Each may be compressed with gzip, bzip2, xz, zstd or lz4. Plain text is UTF-8, or UTF-16 or UTF-32
with a byte order mark.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from farms_jax._extras import from_extra
from farms_jax.errors import InputError, listed, one_line, printable, short_repr

KINDS = (
    "text, .json, .jsonl, .csv, .tsv, .parquet or .arrow, plain or compressed (.gz, .bz2, .xz, .zst), "
    "or token ids in .npy or .npz"
)
Documents = tuple[Literal["text", "documents"], Sequence[str]]

_LINES = (".jsonl", ".ndjson", ".jsonlines")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TABLES = (".parquet", ".arrow", ".feather")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BESIDE = {"dataset_info.json", "state.json", "dataset_dict.json"}  # tables of a data set that `datasets` saved
_CONTROL = bytes({*range(32)} - set(b"\t\n\f\r\x1b"))
_CHAT = ({"messages"}, {"conversations"}, {"conversation"}, {"role", "content"}, {"from", "value"})
# How other files begin, and what to do with them.
_OTHERS = {
    b"PK\3\4": "a zip archive; unpack it and give one of its files",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give one of its files",
    b"%PDF": "a PDF; give its text",
    b"{\\rtf": "RTF; give its text",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch it with git lfs pull",
    b"<!doctype": "markup, which would count as text; give its text alone",
    b"<html": "markup, which would count as text; give its text alone",
    b"<?xml": "markup, which would count as text; give its text alone",
}


def read_documents(path: Path, where: str) -> Documents:
    """Return the kind of a file's content, and its text or its documents; `where` names the file in messages.

    Raises:
        InputError: it has no text under "text", is damaged, or is of a kind that is not read.
        OSError: it cannot be read.
    """
    content, suffixes = _unpacked(path.read_bytes(), where), [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet" or content.startswith(b"PAR1"):
        return "documents", _texts_of_parquet(content, where)
    if suffix in _TABLES or content.startswith(b"ARROW1"):
        return "documents", _texts_of_arrow(content, where)
    text = _decode(content, where)
    if suffix in _LINES:
        return "documents", list(_texts_of_lines(text, where))
    if suffix == ".json":
        return "documents", list(_texts_of_json(text, where))
    if suffix in _DELIMITERS:
        return "documents", list(_texts_of_csv(text, where, _DELIMITERS[suffix]))
    if _is_json_of_texts(text):
        return "documents", list(_texts_of_json(text, where))
    return "text", [text]


def some_documents(folder: Path) -> list[str]:
    """Return files of a folder, and of the folders in it, whose names say that they may be read; at most a few."""
    kinds = (*_TABLES, *_LINES, *_DELIMITERS, ".json", ".txt", *_COMPRESSED)
    found = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.suffix in kinds)
    return [str(path) for path in found if path.name not in _BESIDE][:3]


def _unpacked(content: bytes, where: str) -> bytes:
    """Return what is compressed, by the mark at its start, or the content itself."""
    try:
        for mark, unpack in _UNPACK.items():
            if content.startswith(mark):
                content = unpack(content)
                break
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{where}: cannot be unpacked ({one_line(error)}); download it again") from error
    start = content[:64].lstrip().lower()
    for mark, what in _OTHERS.items():
        if start.startswith(mark.lower()):
            raise InputError(f"{where}: it is {what}")
    if content[257:262] == b"ustar":
        raise InputError(f"{where}: it is a tar archive; unpack it and give one of its files")
    return content


def _by_arrow(kind: str) -> Callable[[bytes], bytes]:
    def unpack(content: bytes) -> bytes:
        with from_extra("prune", f"a file of {kind}"):
            import pyarrow as pa
        with pa.input_stream(pa.BufferReader(content), compression=kind) as stream:
            return stream.read()

    return unpack


_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _by_arrow("zstd"),
    b"\x04\x22\x4d\x18": _by_arrow("lz4"),
}


def _decode(content: bytes, where: str) -> str:
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not {encoding.removesuffix('-sig').upper()} text (byte {content[error.start]:#04x} at "
            f"{error.start}); {_how_to_convert(content)}"
        ) from error
    # UTF-16 and UTF-32 without a mark are valid UTF-8 too, with NULs and other control characters between letters.
    if encoding.startswith("utf-8") and len(content.translate(None, _CONTROL)) < 0.99 * len(content):
        raise InputError(f"{where}: not text, more than 1 % of it are control characters; {_how_to_convert(content)}")
    return text


def _how_to_convert(content: bytes) -> str:
    """Return the remedy for bytes that are no UTF-8, by where their NULs are."""
    first, second, third, fourth = (content[start::4].count(0) / max(len(content) / 4, 1) for start in range(4))
    guess = None
    if min(third, fourth) > 0.9:
        guess = "UTF-32LE"
    elif min(first, second) > 0.9:
        guess = "UTF-32BE"
    elif second + fourth > max(0.05, 4 * (first + third)):
        guess = "UTF-16LE"
    elif first + third > max(0.05, 4 * (second + fourth)):
        guess = "UTF-16BE"
    if guess:
        return f"it looks like {guess} without a byte order mark: iconv -f {guess} -t UTF-8 FILE > NEW"
    return f"convert it to UTF-8 (iconv), or give {KINDS}"


def _is_json_of_texts(text: str) -> bool:
    """Return whether a text of any name begins with a line of JSON, or is an array of it, with texts inside."""
    stripped = text.lstrip()
    if not stripped.startswith(("{", "[")):
        return False
    try:
        first = json.loads(stripped.partition("\n")[0] if stripped.startswith("{") else stripped)
    except (ValueError, RecursionError):
        return False
    items = first if isinstance(first, list) else [first]
    return bool(items) and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in items)


def _texts_of_json(text: str, where: str) -> Iterator[str]:
    """Yield the documents of a `.json` file, which is one value or, as C4's, one object a line."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _parses(lines[0]):
        yield from _texts_of_lines(text, where)
        return
    value = _parsed(text, where)
    if isinstance(value, dict) and "text" not in value:
        tables = [item for item in value.values() if isinstance(item, list)]
        value = tables[0] if len(tables) == 1 and not _is_chat(value) else value
    elif isinstance(value, dict) and isinstance(value["text"], list):  # a column
        value = value["text"]
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        yield from _text_of(item, f"{where}: document {number}" if isinstance(value, list) else where)


def _texts_of_lines(text: str, where: str) -> Iterator[str]:
    # Not splitlines, which splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _text_of(_parsed(line, f"{where}: line {number}"), f"{where}: line {number}")


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({one_line(error)}); correct or remove it") from error


def _is_chat(value: dict[str, Any]) -> bool:
    return any(keys <= value.keys() for keys in _CHAT)


def _text_of(document: Any, where: str) -> list[str]:
    """Return the text of a document, in a list; an empty one where it is null."""
    text = document.get("text", ...) if isinstance(document, dict) else document
    if text is None and isinstance(document, dict):
        return []
    if not isinstance(text, str):
        if isinstance(document, dict) and _is_chat(document):
            remedy = 'a chat: write it into "text" with the model\'s template (tokenizer.apply_chat_template)'
            raise InputError(f'{where} is not an object with a string "text", but {remedy}')
        found = "an object with " + listed(map(printable, document), 8, ", ") if isinstance(document, dict) else None
        raise InputError(
            f'{where} is not an object with a string "text", but {found or short_repr(document)}; '
            'rename the key with the text to "text"'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half of a pair of UTF-16, which is no letter; correct or remove it") from error
    return [text]


def _texts_of_csv(text: str, where: str, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if "text" not in header:
            have = listed(map(printable, header), 12, ", ")
            raise InputError(f'{where}: needs a column "text" in its first line, has {have}; rename the text column')
        column = header.index("text")
        for row in rows:
            if row and len(row) != len(header):
                raise InputError(
                    f"{where}: line {rows.line_num} has {len(row)} fields, the first line {len(header)}; correct it"
                )
            yield from row[column : column + 1]
    except csv.Error as error:
        raise InputError(f"{where}: line {rows.line_num} is no CSV ({one_line(error)}); correct it") from error


def _texts_of_parquet(content: bytes, where: str) -> list[str]:
    with from_extra("prune", where):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(pa.BufferReader(content)) as file:
            _check_columns(file.schema_arrow, where)
            return _texts_of_table(file.read(columns=["text"]))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a readable parquet file ({one_line(error)}); download it again") from error


def _texts_of_arrow(content: bytes, where: str) -> list[str]:
    with from_extra("prune", where):
        import pyarrow as pa
        from pyarrow import ipc
    try:
        buffer = pa.BufferReader(content)
        # `datasets` writes streams into files that are called .arrow.
        with ipc.open_file(buffer) if content.startswith(b"ARROW1") else ipc.open_stream(buffer) as file:
            _check_columns(file.schema, where)
            table = file.read_all()
            table.validate(full=True)  # a damaged file could end the process later
            return _texts_of_table(table)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a readable Arrow file ({one_line(error)}); download it again") from error


def _check_columns(schema: Any, where: str) -> None:
    import pyarrow as pa

    columns = {field.name: field.type for field in schema}
    kind = columns.get("text")
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    if str(kind) not in {"string", "large_string", "string_view"}:
        if _is_chat(columns):
            chat = 'a chat: write it into a column "text" with the model\'s template (tokenizer.apply_chat_template)'
            raise InputError(f'{where}: needs a column "text" of strings, has {chat}')
        have = listed((f"{printable(name)} ({printable(str(kind))})" for name, kind in columns.items()), 12, ", ")
        raise InputError(f'{where}: needs a column "text" of strings, has {have}; rename the text column')


def _texts_of_table(table: Any) -> list[str]:
    return [text for text in table["text"].to_pylist() if text is not None]
