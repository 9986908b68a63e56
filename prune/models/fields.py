"""Reading of a config.json: a field that is missing, of a wrong type or not supported is one clear error."""

import sys
from collections.abc import Mapping
from typing import Any

from farms_jax.errors import InputError, short_repr

MOST_BLOCKS = 10_000  # ten times as deep as any network that was published
MOST = 2**31 - 1  # of any size: products of two, the sizes of arrays, must fit in 63 bits


class Fields:
    """The fields of a config.json, or of an object in it; null reads as left out."""

    def __init__(self, content: Mapping[str, Any], where: str = "config.json") -> None:
        """Wrap parsed JSON; `where` is what messages call it."""
        self.content = content
        self.where = where

    def __contains__(self, name: str) -> bool:
        """Return whether the field is given, and not null."""
        return self.content.get(name) is not None

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """Return an integer from `least` to `most`; without a default it is required."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"an integer of {least} or more", value)
        if value > most:
            raise self.error(name, f"at most {most}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number; without a default it is required."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number", value)
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of positive finite numbers."""
        value = self._get(name, None)
        if not isinstance(value, list):
            raise self.error(name, "a list of numbers", value)
        return tuple(Fields({name: number}, self.where).number(name) for number in value)

    def is_null(self, name: str, default: Any) -> bool:
        """Return whether a field is null, or left out where `default` is None: not all nulls read as left out."""
        return self.content.get(name, default) is None

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    def choice(self, name: str, choices: Mapping[str, Any] | tuple[str, ...], default: str | None = None) -> str:
        """Return one of the names in `choices`; without a default it is required."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, f"one of {', '.join(choices)}", value)
        return value

    def table(self, name: str) -> "Fields | None":
        """Return an object inside the file, None if it is left out or empty."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "an object", value)
        return Fields(value, f"{self.where}: {name}") if value else None

    def raise_if_set(self, name: str, why: str, harmless: Any = False) -> None:
        """Raise an InputError for a field that changes the numbers in an unsupported way, unless null or `harmless`."""
        if name in self and self.content[name] != harmless:
            raise InputError(f"{self.where}: `{name}` is {short_repr(self.content[name])}: {why}")

    def error(self, name: str, expected: str, value: Any) -> InputError:
        """Return the InputError for a value that is not as expected."""
        return InputError(f"{self.where}: `{name}` must be {expected}, got {short_repr(value)}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.content.get(name)
        if value is not None:
            return value
        if default is None:
            raise InputError(f"{self.where}: `{name}` is missing; take the config.json that belongs to the weights")
        return default
