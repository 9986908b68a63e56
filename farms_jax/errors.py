r"""The error for input that cannot be used, and the safe display in its message of what an untrusted file says.

>>> short_repr(["weight\n", {"a": [1, 2]}]), len(short_repr("x" * 1000)), short_repr(10**5000)
("['weight\\n', {'a': [1, 2]}]", 100, 'an integer of 16610 bits')
>>> printable("layer.weight"), printable("\x1b[31m")
('layer.weight', "'\\x1b[31m'")
"""

import reprlib
from collections.abc import Iterable
from typing import Any

_MAX_SHOWN = 100  # characters of a value or a name
_MAX_LINE = 300  # characters of an error's text


class InputError(ValueError):
    """Something given cannot be used; the message names it, says why, and what to do."""


class MissingPackageError(InputError):
    """A package is not installed; `what` says which, and what needs it, and the message how to do without or get it."""

    def __init__(self, what: str, remedy: str) -> None:
        """Join both."""
        super().__init__(what + remedy)
        self.what = what


class AxesWarning(UserWarning):
    """What the axes of a network's weights count was told from their shapes alone."""


class LeftOutWarning(AxesWarning):
    """Much of a network is left out of an analysis, because nothing says what the axes of its weights count."""


class _ShortRepr(reprlib.Repr):
    """`repr` of bounded length: few items, few levels, the middle of long texts left out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring = self.maxother = _MAX_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write more than 4300 digits.
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _ShortRepr()


def short_repr(value: Any) -> str:
    """Return the `repr` of a value on one line, with the middle left out where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 2 * _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...{text[-_MAX_SHOWN:]}"


def printable(text: str) -> str:
    """Return a text unchanged if it is short and printable; else quoted and escaped, with the middle left out."""
    if len(text) > _MAX_SHOWN:
        text = f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"
    return text if text.isprintable() else repr(text)


def one_line(error: BaseException) -> str:
    """Return the message of another library's error on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: 2 * _MAX_LINE])
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}..."


def listed(texts: Iterable[str], most: int = 10, separator: str = "; ") -> str:
    """Return texts on one line; of those beyond `most` only their number.

    >>> listed(["q", "k", "v"], 2, ", ")
    'q, k, and 1 more'
    """
    texts = list(texts)
    more = f"{separator}and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
