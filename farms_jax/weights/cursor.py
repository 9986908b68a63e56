"""Reading the values of a binary file one after the other, never past its end."""

import os
import struct
from pathlib import Path
from typing import IO, Any, Literal

from farms_jax.errors import InputError


class Cursor:
    """A place in a file.

    Attributes:
        file: open for reading.
        path: of the file.
        size: of the file in bytes.
    """

    order: Literal["<", ">"] = "<"  # of bytes, as in `struct`
    content = "metadata"  # what is read, for messages
    remedy = "download it again"

    def __init__(self, file: IO[bytes], path: Path) -> None:
        """Start where the file stands.

        Args:
            file: open for reading.
            path: of the file.
        """
        self.file, self.path, self.size = file, path, path.stat().st_size

    def take(self, count: int) -> bytes:
        """Read bytes; raises InputError where there are not so many."""
        self._check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        """Pass over bytes; raises InputError where there are not so many."""
        self._check(count)
        self.file.seek(count, os.SEEK_CUR)

    def number(self, code: str) -> Any:
        """Read a number, in the words of `struct`."""
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        """Read numbers of one kind, in the words of `struct`."""
        # Sized before the format is made: a damaged count would make it endless.
        raw = self.take(count * struct.calcsize(f"{self.order}{code}"))
        return struct.unpack(f"{self.order}{count}{code}", raw)

    def _check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise InputError(f"{self.path}: its {self.content} goes past the end of the file: truncated; {self.remedy}")
