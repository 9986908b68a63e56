"""What the axes of every leaf count, as declared: by patterns, as a tree, or by a function of the parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from farms_jax._axes import FLAX_AXES, Axes, LeafAxes
from farms_jax._default_axes import is_small
from farms_jax._names import matching, name_of
from farms_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class AxisRules:
    r"""What the axes of the leaves count, for a family of networks: a value of `axes=`.

    A leaf goes by the first pattern that matches its whole name. Here a pattern may match no leaf of a network; in
    plain mappings, `axes={...}` and `stack={...}`, which describe one network, that is an error.

    >>> import farms_jax, jax
    >>> rules = farms_jax.AxisRules({r".*/query/kernel": "IOO"}, stack={r"blocks/.*": 0})
    >>> params = {"blocks": {"query": {"kernel": jax.random.normal(jax.random.key(0), (2, 32, 4, 8))}}}
    >>> farms_jax.analyze(params, axes=rules).names
    ('blocks/query/kernel[0]', 'blocks/query/kernel[1]')

    Attributes:
        axes: a spelling for each pattern: one letter for every axis of the leaf except those of its stack, `I` for
            inputs, `O` for outputs, others for kernel positions, such as `"HWIO"` or `"KIO"`; axes with the same letter
            I or O are merged in order. Of several spellings, `"IO|IOO"`, that of the leaf's rank counts. `Axes` instead
            are for 2-D weights and 4-D kernels, optax's `MuonDimensionNumbers` for any; `None` says that the leaf is no
            matrix.
        stack: for each pattern the axis that counts layers, experts or seeds, or a tuple of several, outermost first;
            `None` for no stack.
        default: axes of the 2-D weights and 4-D kernels that no pattern of `axes` matches; `None` for those of the
            checkpoint's format, and `FLAX_AXES` for a tree.
        file: file that describes one network with these rules: errors name it, and each pattern has to match a leaf.
    """

    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stack: Mapping[str, int | tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    default: Axes | None = FLAX_AXES
    file: str | None = None


class Declared(NamedTuple):
    """What is declared of one leaf.

    Attributes:
        stack: its axes that count layers, experts or seeds.
        axes: all of its axes; `None` where they are not declared.
        is_matrix: whether it may be a layer.
    """

    stack: tuple[int, ...] = ()
    axes: LeafAxes | None = None
    is_matrix: bool = True


def declared_axes(
    leaves: Sequence[tuple[str, Any]], params: Any, axes: Any, stack: Any = None
) -> tuple[Axes, dict[str, Declared]]:
    """Return the default axes, and what is declared of each leaf, by name.

    Args:
        leaves: (name, leaf) of all leaves; arrays, or anything with `shape`.
        params: argument of `axes` and `stack` where they are functions.
        axes: `Axes`, `AxisRules`, a mapping from patterns to spellings, a tree of spellings like the parameters, or a
            function that gives one of these.
        stack: an axis or a tuple of axes for all leaves, a mapping from patterns to them, a tree of them, a function
            that gives one of these, or `None`.

    Raises:
        InputError: a pattern matches nothing, a tree lacks a leaf, or a declaration does not fit its leaf.
    """
    axes, stack = (value(params) if _is_function(value) else value for value in (axes, stack))
    try:
        return _declared(leaves, AxisRules(default=axes) if isinstance(axes, Axes) else axes, stack)
    except InputError as error:
        if isinstance(axes, AxisRules) and axes.file is not None:
            raise InputError(f"{axes.file}: {error}") from error
        raise


def _declared(leaves: Sequence[tuple[str, Any]], rules: Any, stack: Any) -> tuple[Axes, dict[str, Declared]]:
    names = [name for name, _ in leaves]
    if isinstance(rules, AxisRules):
        if stack is not None and rules.stack:
            raise InputError("stack: the AxisRules given as axes have one; give it in one place")
        default, strict = rules.default or FLAX_AXES, rules.file is not None
        spellings = _by_pattern(names, rules.axes, "axes", _is_spelling, strict=strict)
        stacks = _by_pattern(names, rules.stack, "stack", _is_stack, strict=strict)
    else:
        default, stacks = FLAX_AXES, {}
        spellings = _by_name(names, rules, "axes", _is_spelling)
    if stack is None:
        # Haiku's `layer_stack` has a name that nothing else has; one in another has an axis for each.
        depths = {name: len(re.findall(r"(?:^|/)(?:__)?layer_stack", name)) for name in names}
        stacks = {name: tuple(range(depth)) for name, depth in depths.items() if depth} | stacks
    else:
        stacks = dict.fromkeys(names, stack) if _is_stack(stack) else _by_name(names, stack, "stack", _is_stack)
    found = {}
    for name, leaf in leaves:
        shape = tuple(getattr(leaf, "shape", ()))
        own = _stack_axes(name, stacks.get(name), shape)
        spelling = spellings.get(name)
        if hasattr(spelling, "reduction_axis") and is_small(name, len(shape) - len(own)):
            # Muon's numbers are often made by rank alone, and a bias of attention has two axes.
            found[name] = Declared(own)
        elif spelling is None:
            found[name] = Declared(own, is_matrix=name not in spellings)
        else:
            spelt = axes_spelt(name, spelling, shape, own)
            found[name] = Declared(spelt.stack, spelt)
    return default, found


def _by_name(names: list[str], values: Any, argument: str, is_value: Callable[[Any], bool]) -> dict[str, Any]:
    """Return what a mapping from patterns, or a tree, gives for these names."""
    if isinstance(values, Mapping) and all(map(is_value, values.values())):
        return _by_pattern(names, values, argument, is_value, strict=True)
    tree = {name_of(path): value for path, value in jax.tree_util.tree_leaves_with_path(values, is_leaf=is_value)}
    _check(tree, argument, is_value)
    if missing := [name for name in names if name not in tree]:
        raise InputError(
            f"{argument}: the tree has nothing for {missing[0]}; give one like the parameters, or patterns"
        )
    return {name: tree[name] for name in names}


def _by_pattern(
    names: list[str], values: Mapping[str, Any], argument: str, is_value: Callable[[Any], bool], *, strict: bool
) -> dict[str, Any]:
    """Return the value of the first pattern that matches, by name; `strict` where each has to match one."""
    _check(values, argument, is_value)
    found: dict[str, Any] = {}
    for pattern, value in values.items():
        # A flat tree of parameters is a mapping too: a name matches itself, whatever characters it has.
        hits = {pattern} if pattern in names else matching(names, pattern, argument, strict=strict)
        found = dict.fromkeys(hits, value) | found
    return found


def _check(values: Mapping[str, Any], argument: str, is_value: Callable[[Any], bool]) -> None:
    if wrong := [key for key, value in values.items() if not is_value(value)]:
        raise InputError(
            f"{argument}: {values[wrong[0]]!r}, given for {wrong[0] or 'all'}, is none of what farms_jax.AxisRules has"
        )


def _is_function(value: Any) -> bool:
    # A tree may be callable too: a module of Equinox, or of NNX.
    return callable(value) and jax.tree_util.all_leaves([value])


def _is_spelling(value: Any) -> bool:
    return value is None or isinstance(value, str | Axes | LeafAxes) or hasattr(value, "reduction_axis")


def _is_stack(value: Any) -> bool:
    return value is None or all(type(axis) is int for axis in (value if isinstance(value, tuple) else (value,)))


def _stack_axes(name: str, stack: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = () if stack is None else (stack,) if isinstance(stack, int) else stack
    return _counted(name, "stack", axes, list(range(len(shape))), shape)


def _counted(
    name: str, argument: str, axes: Sequence[int], among: list[int], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return axes given by their places `among` some axes of a leaf, negative ones from the end."""
    if any(not -len(among) <= axis < len(among) for axis in axes):
        raise InputError(f"{argument}: {name} has no axis {max(axes, key=abs)}; its shape is {shape}")
    found = tuple(among[axis] for axis in axes)
    if len(set(found)) < len(found):
        raise InputError(f"{argument}: {name} is given one of its axes twice: {tuple(axes)}")
    return found


def axes_spelt(name: str, spelling: Any, shape: tuple[int, ...], stack: tuple[int, ...]) -> LeafAxes:
    """Return the axes of a leaf by their spelling (see `AxisRules`).

    Raises:
        InputError: it does not fit the shape.
    """
    if isinstance(spelling, LeafAxes):
        return spelling
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    if isinstance(spelling, str):
        return _by_letters(name, spelling, shape, stack, rest)
    if isinstance(spelling, Axes):
        if len(rest) not in {2, 4}:
            raise InputError(f"axes: {name} has shape {shape}; `Axes` are for weights with 2 or 4 axes, spell others")
        outputs, inputs = _counted(name, "axes", (spelling.rows, spelling.cols), rest, shape)
        return LeafAxes((outputs,), (inputs,), stack)
    outputs = _counted(name, "axes", _as_tuple(spelling.output_axis), rest, shape)
    inputs = _counted(name, "axes", _as_tuple(spelling.reduction_axis), rest, shape)
    if shared := set(outputs) & set(inputs):
        raise InputError(f"axes: {name} is given axis {min(shared)} for its inputs and for its outputs")
    others = [axis for axis in rest if axis not in {*outputs, *inputs}]  # Muon takes such matrices one by one
    return LeafAxes(outputs, inputs, (*stack, *others))


def _by_letters(name: str, spelling: str, shape: tuple[int, ...], stack: tuple[int, ...], rest: list[int]) -> LeafAxes:
    spellings = spelling.split("|")
    letters = next((each for each in spellings if len(each) == len(rest)), spellings[0])
    if not letters.isalpha() or not {"I", "O"} <= set(letters):
        raise InputError(
            f"axes: {spelling!r}, given for {name}, must be letters, with an I for inputs and an O for outputs"
        )
    if len(letters) != len(rest):
        beside = f" beside its stack's {len(stack)}" if stack else ""
        remedy = "; say with `stack` which of them count layers, experts or seeds" if len(letters) < len(rest) else ""
        raise InputError(
            f"axes: {spelling!r}, given for {name}, spells {len(letters)} axes; "
            f"it has {len(rest)}{beside}: {shape}{remedy}"
        )
    of_letter = {letter: tuple(a for a, own in zip(rest, letters, strict=True) if own == letter) for letter in "OI"}
    return LeafAxes(of_letter["O"], of_letter["I"], stack)


def _as_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
