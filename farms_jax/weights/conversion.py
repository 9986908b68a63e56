"""Tables that say where each tensor of a checkpoint goes in a model's parameters, read in both directions.

A row has the tensor's name in the checkpoint, its path in the parameters, and the conversion between their layouts;
`{}` stands for a block number. Each model has its table beside it.

>>> import numpy as np
>>> table = Table([Row("layers.{}.up.weight", "blocks/{}/up/kernel", LINEAR)])
>>> row = table.by_name("layers.3.up.weight")
>>> row.path, row.to_ours(np.zeros((16, 32))).shape
('blocks/3/up/kernel', (32, 16))
>>> table.by_path("blocks/3/up/kernel").name
'layers.3.up.weight'
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from farms_jax.errors import printable, short_repr

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How an array of the checkpoint becomes ours, and back; for NumPy and JAX arrays."""

    rank: int | None  # axes of the checkpoint's array; None: any number
    to_ours: Callable[[Any], Any]
    to_theirs: Callable[[Any], Any]


def transposed(*order: int) -> Layout:
    """Return the layout that takes the checkpoint's axes in this order."""
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return Layout(len(order), lambda a: a.transpose(order), lambda a: a.transpose(inverse))


SAME = Layout(None, lambda a: a, lambda a: a)
LINEAR = transposed(1, 0)  # (out, in) <-> (in, out)


class Row(NamedTuple):
    """A tensor's name, path and layout; in a look-up's result with the block number filled in."""

    name: str  # in the checkpoint
    path: str | None  # in the parameters; None: known, but not needed
    layout: Layout = SAME

    def to_ours(self, array: Any) -> Any:
        """Return the checkpoint's array in our layout; one of another rank as it is, for the check of shapes."""
        return array if self.layout.rank not in {None, array.ndim} else self.layout.to_ours(array)


class Table:
    """Rows, of which at most one matches a name or a path."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Compile the rows' names and paths."""
        rows = list(rows)
        self._by_name = [(_pattern(row.name), row) for row in rows]
        self._by_path = [(_pattern(row.path), row) for row in rows if row.path is not None]

    def by_name(self, name: str) -> Row | None:
        """Return the row with a tensor's name in the checkpoint; `None` for an unknown one."""
        return _look_up(name, self._by_name)

    def by_path(self, path: str) -> Row | None:
        """Return the row with a parameter's path; `None` for an unknown one."""
        return _look_up(path, self._by_path)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(0|[1-9]\d*)"))


def _look_up(text: str, patterns: Iterable[tuple[re.Pattern[str], Row]]) -> Row | None:
    matches = [(match, row) for pattern, row in patterns if (match := pattern.fullmatch(text))]
    if len(matches) > 1:
        raise ValueError(f"{text} fits two rows of a table: {' and '.join(row.name for _, row in matches)}")
    if not matches:
        return None
    match, row = matches[0]
    path = None if row.path is None else row.path.format(*match.groups())
    return Row(row.name.format(*match.groups()), path, row.layout)


def mismatches(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> dict[str, str]:
    """Return name -> what is wrong with a tensor's shape, for those that are missing, unexpected or of another shape.

    >>> mismatches({"a": (2,), "b": (3,)}, {"a": (1,), "c": (4,)})
    {'c': 'missing: c [4]', 'a': 'of another shape: a is [2], must be [1]', 'b': 'unexpected: b [3]'}
    """
    faults = {name: f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found}
    for name, shape in found.items():
        if name not in expected:
            faults[name] = f"unexpected: {printable(name)} {short_repr(list(shape))}"
        elif tuple(shape) != tuple(expected[name]):
            faults[name] = f"of another shape: {name} is {short_repr(list(shape))}, must be {list(expected[name])}"
    return faults
