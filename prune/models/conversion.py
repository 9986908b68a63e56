"""Where each tensor of a checkpoint goes: a table of patterns, of which exactly one fits each name.

A rule reads `model.layers.3.mlp.up_proj.weight` -> block 3, `mlp/up_proj/kernel`, transposed. Names of tensors are
those of the checkpoint, paths are those of our Flax modules.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from farms_jax.errors import InputError
from farms_jax.weights.sanitise import printable

_LISTED = 10  # tensors that an error names

Part = int | Literal["embed", "head"]  # number of a block, or one of the two ends
Kind = Literal["embed", "block", "head"]
Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One line of the table."""

    pattern: str  # of the whole name; a group named `block` catches the block's number
    kinds: tuple[Kind, ...]  # parts that use the tensor; none: known, but not needed
    path: str = ""  # where in the module, a template for `re.Match.expand`
    transposed: bool = False  # ours is the transpose of the checkpoint's


class Place(NamedTuple):
    """Where one tensor goes."""

    parts: tuple[Part, ...]
    path: str
    transposed: bool


def place(rules: Iterable[Rule], name: str) -> Place | None:
    r"""Find where a tensor goes.

    >>> rule = Rule(r"layers\.(?P<block>\d+)\.(up|down)\.weight", ("block",), r"\2/kernel", True)
    >>> place([rule], "layers.3.up.weight")
    Place(parts=(3,), path='up/kernel', transposed=True)

    Args:
        rules: the table.
        name: of the tensor in the checkpoint.

    Returns:
        The place, without parts if the tensor is known but not needed; None for an unknown name.

    Raises:
        InputError: if more than one rule fits.
    """
    matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
    if not matches:
        return None
    if len(matches) > 1:
        patterns = " and ".join(rule.pattern for rule, _ in matches)
        raise InputError(f"tensor {name}: fits {patterns}; the conversion table must have one rule for it")
    rule, match = matches[0]
    parts: tuple[Part, ...] = tuple(int(match["block"]) if kind == "block" else kind for kind in rule.kinds)
    return Place(parts, match.expand(rule.path), rule.transposed)


def check(rules: Iterable[Rule], expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compare the tensors of a checkpoint with those that a network needs.

    Args:
        rules: the table.
        expected: shapes of all tensors that are needed, by name, as in the checkpoint.
        found: shapes of all tensors that are there, by name.

    Raises:
        InputError: one for all tensors that are unknown, missing or of another shape; it lists the first ones.
    """
    rules = list(rules)
    faults = [f"missing: {printable(name)} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name in expected:
            if tuple(shape) != tuple(expected[name]):
                faults.append(f"of another shape: {printable(name)} is {list(shape)}, must be {list(expected[name])}")
            continue
        target = place(rules, name)
        if target is None:
            faults.append(f"unknown: {printable(name)} {list(shape)}")
        elif target.parts:
            faults.append(f"not in a network of this config.json: {printable(name)} {list(shape)}")
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise InputError(
            f"{len(faults)} tensor(s) do not fit the config.json (use the one that belongs to these weights, "
            f"and the complete set of weight files): {'; '.join(faults[:_LISTED])}{more}"
        )
