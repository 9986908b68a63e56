"""Atomic file writes, and checksums of files."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

CHECKSUMS = "SHA256SUMS"
_PIECE = 1 << 22  # bytes read at a time for a checksum


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for `~`; one of a user who is unknown stays as it is: no such file."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def atomic(path: Path, *, shared: bool = False) -> Generator[Path, None, None]:
    """Write a file atomically: under another name, and renamed when it is complete.

    A link stays one, to the new file; into a device or a pipe, such as `/dev/stdout`, is written at once.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic(path) as part:
    ...     _ = part.write_text("1 2 3")
    >>> path.read_text()
    '1 2 3'

    Args:
        path: Path of the file; folders are made.
        shared: Whether other processes may write the same file at the same time, without a lock.

    Yields:
        Path to write to. It becomes `path` at the end; after an error there is no new file and the old one stays.

    Raises:
        OSError: It cannot be written; the error has a file name.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a rename would take its place
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part" if shared else f"{path.name}.part")
    try:
        yield part
        # Written now: else, after a power cut, the name may exist and hold nothing.
        with part.open("r+b") as file:  # Windows refuses to flush what is open for reading alone
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename in {None, str(part)}:  # a full disk, met in writing, does not say where
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def reserve(file: int, size: int) -> None:
    """Give an open file, by its descriptor, its size in bytes (at least 1), and where the system can the disk space.

    Raises:
        OSError: There is not enough space.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a UTF-8 text file atomically; for `shared` see `atomic`."""
    with atomic(path, shared=shared) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Write a JSON file atomically; what JSON does not know is written as its `str`. For `shared` see `atomic`."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n", shared=shared)


def sha256(*paths: Path, title: str | None = None) -> str:
    """Return the SHA-256 of files, read one after the other, in hexadecimal; with a `title`, a bar shows progress."""
    digest, total = hashlib.sha256(), sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=title is None) as bar:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    bar.update(len(piece))
    return digest.hexdigest()


def write_checksums(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Write `SHA256SUMS` of all files in a folder and below, or of some of them; `sha256sum -c` reads it too."""
    paths = _files(folder) if paths is None else paths
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    write_text(folder / CHECKSUMS, "".join(lines))


def damaged_files(folder: Path, *, exact: bool = False) -> list[Path]:
    """Return the files of a folder that are missing or not as `write_checksums` found them.

    `SHA256SUMS` itself is among them where it is missing, cut off or unreadable; with `exact`, also where a file in the
    folder is not listed, as then the list was cut off.
    """
    sums = folder / CHECKSUMS
    try:
        text = sums.read_text(encoding="utf-8")
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}
    except (OSError, ValueError):
        return [sums]
    found = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if not text.endswith("\n") or (exact and found - set(expected)):
        return [sums]
    paths = {folder / name: digest for name, digest in expected.items()}
    return [path for path, digest in paths.items() if not path.is_file() or sha256(path) != digest]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
