"""Folders that one process at a time works in; needs filelock, an extra of the programs."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from farms_jax.errors import InputError


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep a folder for this process as long as the `with` block lasts, or the process.

    The file `.lock` in it stays: what counts is who holds it, and the system lets go of it when a process ends.

    Args:
        folder: made where there is none.

    Yields:
        Nothing.

    Raises:
        InputError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder}: another process is at work there; wait until it has ended, or stop it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
