"""What a rule of quantisation is given, and what it returns: stored arrays, and a weight that they stand for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from farms_jax.weights.reading import TensorInfo

_FLOAT32 = np.dtype(np.float32)


class Weight(NamedTuple):
    """A weight that several stored arrays stand for.

    Attributes:
        name: its name.
        info: its dtype and shape.
        parts: argument of `decode` -> stored array.
        decode: returns the weight, float32, of its parts.
        method: name of the rule, with its bits.
    """

    name: str
    info: TensorInfo
    parts: Mapping[str, str]
    decode: Callable[..., np.ndarray]
    method: str


class Stored(NamedTuple):
    """One array of a checkpoint, and what is beside it."""

    name: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    read: Callable[[str], np.ndarray]

    @property
    def info(self) -> TensorInfo:
        """The array's dtype and shape."""
        return self.tensors[self.name]

    @property
    def module(self) -> str:
        """What the name begins with, up to the last separator."""
        return self.name[: max(self.name.rfind("."), self.name.rfind("/")) + 1]

    def beside(self, **endings: str) -> dict[str, str]:
        """Return argument -> name, for those names that exist: the module's, or the array's own where it has a `+`."""
        names = {key: self.name + end[1:] if end[0] == "+" else self.module + end for key, end in endings.items()}
        return {key: name for key, name in names.items() if name in self.tensors}

    def weight(
        self, shape: tuple[int, ...], parts: dict[str, str], decode: Callable[..., Any], method: str, name: str = ""
    ) -> Weight:
        """Return a weight, called like the array unless `name` is given."""
        return Weight(name or self.name, TensorInfo(_FLOAT32, shape), parts, decode, method)

    def renamed(self, leaf: str) -> str:
        """Return the name with another last part."""
        return self.module + leaf


Rule = Callable[[Stored], Weight | str | None]
