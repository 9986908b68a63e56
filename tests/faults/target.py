"""What a target of the fuzzing is, and what a refusal must be."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.mutations import Mutator

TEXT = "It's 12345 o'clock, \t naïve «Grüße» 你好 🙂!\r\n\n  end"
_LONGEST = 3000  # characters of a message: ten tensors, and what to do


class Target(NamedTuple):
    """A reader.

    Attributes:
        files: how many mutants of it CI reads.
        samples: writes valid files or folders into a folder, and returns them.
        mutators: pattern of a file's name -> how it is mutated; the first that matches counts, of a folder too.
        read: does with a file or folder what the product does.
    """

    files: int
    samples: Callable[[Path], Sequence[Path]]
    mutators: dict[str, Mutator]
    read: Callable[[Path], None]

    def mutator(self, path: Path) -> Mutator | None:
        """How a file is mutated; None for one that stays."""
        return next((how for pattern, how in self.mutators.items() if fnmatch.fnmatch(path.name, pattern)), None)


def new_folder(folder: Path, name: str) -> Path:
    """Make a folder in another."""
    (path := folder / name).mkdir(parents=True)
    return path


def both(*steps: Callable[[], object]) -> None:
    """Do all, whatever the first ones refuse."""
    from farms_jax.errors import InputError

    refusal = None
    for step in steps:
        try:
            step()
        except InputError as error:
            # The first one that is not as it should be counts.
            refusal = error if refusal is None or not check_message(refusal) else refusal
    if refusal is not None:
        raise refusal


def check_message(error: Exception) -> str:
    """What is wrong with a refusal, which is one line that a terminal can show; "" where nothing is."""
    message = str(error)
    if not message or not message.isprintable():
        return f"not one printable line: {message!r:.300}"
    return "" if len(message) < _LONGEST else f"a message of {len(message)} characters: {message:.300}"
