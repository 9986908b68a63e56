r"""What is in a file, as messages show it and as arrays can be: names, values and shapes that nobody has checked yet.

>>> shown(["weight\n", {"a": [1, 2]}]), len(shown("x" * 1000)), shown(10**5000)
("['weight\\n', {'a': [1, 2]}]", 100, 'an integer of 16610 bits')
>>> plain("layer.weight"), plain("\x1b[31m")
('layer.weight', "'\\x1b[31m'")
"""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

from farms_jax.errors import InputError

_LONGEST_NAME = 500  # characters; GGUF allows 64, a state of an optimiser inside others has 200
_MOST_AXES = 64  # numpy's
_MOST_BYTES = 2**63
_SHOWN = 100  # characters of a value or a name
_REASON = 300


class _Short(reprlib.Repr):
    """`repr` of any value at a bounded length: few items, few levels, the middle of long ones left out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring = self.maxother = _SHOWN

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write more than 4300 digits.
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """Return a value's `repr`, on one line and cut where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


def plain(text: str) -> str:
    """Return a text as it is, but quoted where it is not printable, and cut where it is long."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"
    return text if text.isprintable() else repr(text)


def reason(error: BaseException) -> str:
    """Return what an error of another library says, on one line and cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: 2 * _REASON])
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."


def check_name(name: str, where: str) -> None:
    """Check the name of a tensor, which tables, messages and files will show.

    Args:
        name: of the tensor.
        where: the file, for the message.

    Raises:
        InputError: it is very long, or has letters that cannot be printed.
    """
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"{where}: a tensor is called {shown(name)}, which is no name (printable, at most {_LONGEST_NAME} "
            "characters); download or write it again"
        )


def is_valid_shape(shape: Sequence[int], itemsize: int) -> bool:
    """Return whether there can be an array of a shape, on any machine: also one without entries has its limits."""
    if len(shape) > _MOST_AXES or any(size >= _MOST_BYTES for size in shape):
        return False
    return math.prod(size for size in shape if size) * itemsize < _MOST_BYTES
