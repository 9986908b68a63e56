"""What a target of the fuzzing is, and what a refusal must be."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.mutations import Mutator

TEXT = "It's 12345 o'clock, \t naïve «Grüße» 你好 🙂!\r\n\n  end"
_LONGEST = 3000  # characters of a message: ten tensors, and what to do


class Target(NamedTuple):
    """A reader to be fuzzed."""

    files: int  # mutants that the tests read
    samples: Callable[[Path], Sequence[Path]]  # writes valid files or folders into a folder, and returns them
    mutators: dict[str, Mutator]  # pattern of a file's name -> how it is mutated; the first match counts
    read: Callable[[Path], None]  # reads a file or folder as the product does

    def mutator(self, path: Path) -> Mutator | None:
        """How a file is mutated; `None` for one that is not."""
        return next((how for pattern, how in self.mutators.items() if fnmatch.fnmatch(path.name, pattern)), None)


def new_folder(folder: Path, name: str) -> Path:
    """Make a folder in another."""
    (path := folder / name).mkdir(parents=True)
    return path


def both(*steps: Callable[[], object]) -> None:
    """Take all steps, even after a refusal, which is raised at the end."""
    from farms_jax.errors import InputError

    refusal = None
    for step in steps:
        try:
            step()
        except InputError as error:
            # A faulty message counts before others.
            refusal = error if refusal is None or not check_message(refusal) else refusal
    if refusal is not None:
        raise refusal


def check_message(error: Exception) -> str:
    """What is wrong with a refusal, which must be one printable line; "" if nothing is."""
    message = str(error)
    if not message or not message.isprintable():
        return f"not one printable line: {message!r:.300}"
    return "" if len(message) < _LONGEST else f"a message of {len(message)} characters: {message:.300}"
