"""A lock on a folder in which one process at a time works; needs filelock, an extra of the programs."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from farms_jax.errors import InputError


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock a folder for this process during the `with` block.

    The folder is made where there is none. The file `.lock` in it stays: what counts is who holds it, and the system
    releases it when a process ends.

    Raises:
        InputError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"{folder}: another process is at work there; wait until it has ended, or stop it, or name another folder"
        ) from None
