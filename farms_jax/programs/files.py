"""Files that are there whole or not at all, and their hashes: what every program's run directory rests on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"


@contextlib.contextmanager
def atomic(path: Path) -> Generator[Path, None, None]:
    """Write a file under another name, and give it its own when it is whole.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic(path) as part:
    ...     _ = part.write_text("1 2 3")
    >>> path.read_text()
    '1 2 3'

    Args:
        path: where the file will be; folders are made.

    Yields:
        Path to write to. It becomes `path` at the end; after an error there is no new file and the old one stays.

    Raises:
        OSError: it cannot be written; the error has a file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        _see_to_disk(part)
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk, met in writing, does not say where
        raise
    finally:
        part.unlink(missing_ok=True)


def _see_to_disk(path: Path) -> None:
    """Have the system write a file now: after a power cut a name that is there may else hold nothing."""
    with path.open("r+b") as file:  # Windows refuses to flush what is open for reading alone
        os.fsync(file.fileno())


def reserve(file: int, size: int) -> None:
    """Give an open file its size, and where the system can the disk space for it.

    Args:
        file: descriptor.
        size: in bytes, at least 1.

    Raises:
        OSError: there is not enough space.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all; what JSON does not know is written as its `str`."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files in a folder and below; `sha256sum -c` reads it too."""
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    write_text(folder / CHECKSUMS, "".join(lines))


def damaged_files(folder: Path, *, exact: bool = False) -> list[Path]:
    """Find what is not as `write_checksums` saw it.

    Args:
        folder: with a file `SHA256SUMS`.
        exact: a file without a checksum is a sign that `SHA256SUMS` was cut off.

    Returns:
        Files that are missing, cut off or changed; `SHA256SUMS` itself where it is missing, cut off or unreadable.
    """
    sums = folder / CHECKSUMS
    try:
        text = sums.read_text(encoding="utf-8")
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}
    except (OSError, ValueError):
        return [sums]
    there = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if not text.endswith("\n") or (exact and there - set(expected)):
        return [sums]
    paths = {folder / name: digest for name, digest in expected.items()}
    return [path for path, digest in paths.items() if not path.is_file() or sha256(path) != digest]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
