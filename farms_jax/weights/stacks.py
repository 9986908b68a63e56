"""Layers that were stacked into one array, where the tree itself says so: as `nn.scan`, `nnx.vmap` and `jax.vmap` do.

Such a subtree has one axis more in every array, of one length, and kernels and biases that fit together only without
it. Where they would fit together with it too, as the kernel (4, 4, 16) of a `DenseGeneral` and its bias (4, 16) do, or
where a single module is all there is, nothing is said.

>>> import numpy as np
>>> def block(*lead):
...     shapes = {"up/kernel": (8, 32), "up/bias": (32,), "down/kernel": (32, 8), "norm/scale": (8,)}
...     return {f"blocks/{name}": TensorInfo(np.dtype("f4"), (*lead, *shape)) for name, shape in shapes.items()}
>>> print(*find(block(6)))  # doctest: +ELLIPSIS
blocks is read as 6 layers stacked along axis 0 of all its 4 arrays: up/kernel (6, 8, 32) has the bias (6, 32), ...
>>> find(block())
[]
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from farms_jax._axes import FLAX_AXES
from farms_jax._axis_rules import AxisRules
from farms_jax._default_axes import Shapes, is_norm
from farms_jax.errors import listed, printable
from farms_jax.weights.layout import Layout
from farms_jax.weights.reading import TensorInfo

_AXES = 0, 1  # that are looked at; behind them come the axes of a layer
_BIASES = {"kernel": "bias", "w": "b"}  # of the weights of Flax, and of Haiku and those who name them alike
_MATRICES = {*_BIASES, "weight", "embedding", "embeddings"}
_BY_NAME = re.compile(r"(^|/)(__)?layer_stack")  # Haiku's stacks, which are known


class Stack(NamedTuple):
    """A subtree whose arrays hold several layers.

    Attributes:
        prefix: what the names of its arrays start with; empty for all.
        axes: the axes that count layers, outermost first; the last is this stack's own.
        length: how many layers that one counts.
        arrays: how many arrays there are.
        evidence: what says so, in words.
    """

    prefix: str
    axes: tuple[int, ...]
    length: int
    arrays: int
    evidence: str

    def __str__(self) -> str:
        """Return in words what is read as a stack, and why."""
        subtree = printable(self.prefix[:-1]) if self.prefix else "the whole tree"
        along = f"stacked along axis {self.axes[-1]} of all its {self.arrays} arrays"
        return f"{subtree} is read as {self.length} layers {along}: {self.evidence}"


def with_stacks(layout: Layout, tensors: Mapping[str, TensorInfo]) -> Layout:
    """Return a layout with the stacks that the tree tells of, and with a doubt for them.

    Only in Flax's order of axes, and where no names say which axes count layers.
    """
    rules = layout.axes if isinstance(layout.axes, AxisRules) else AxisRules(default=layout.axes)
    if rules.default != FLAX_AXES or rules.stack or any(map(_BY_NAME.search, tensors)):
        return layout
    stacks = find(tensors)
    if not stacks:
        return layout
    patterns = {f"{re.escape(stack.prefix)}.*": stack.axes for stack in stacks}
    told = listed(map(str, sorted(stacks)), 3)
    return Layout(AxisRules(rules.axes, patterns, FLAX_AXES), "; ".join(filter(None, (layout.doubt, told))))


def find(tensors: Mapping[str, TensorInfo]) -> list[Stack]:
    """Return the stacks among a model's weights, those inside others first."""
    return list(_inside("", {name: tuple(info.shape) for name, info in tensors.items()}, tensors, ()))


def _inside(prefix: str, shapes: Shapes, tensors: Mapping[str, TensorInfo], outer: tuple[int, ...]) -> Iterator[Stack]:
    """Yield the stacks among arrays with one prefix, whose shapes are given without the axes `outer` of a stack."""
    children: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := re.match(r"[^/.]+[/.]", name[len(prefix) :]):
            children.setdefault(prefix + match[0], {})[name] = shape
    is_chain = len(children) == 1 and len(next(iter(children.values()))) == len(shapes)
    found = [] if is_chain else _possible(prefix, shapes, tensors)
    if len(found) != 1:
        for child, own in children.items():
            yield from _inside(child, own, tensors, outer)
        return
    ((axis, length, evidence),) = found
    axes = (*outer, [place for place in range(len(outer) + 2) if place not in outer][axis])
    yield from _inside(prefix, {name: _without(axis, shape) for name, shape in shapes.items()}, tensors, axes)
    yield Stack(prefix, axes, length, len(shapes), evidence)


def _possible(prefix: str, shapes: Shapes, tensors: Mapping[str, TensorInfo]) -> list[tuple[int, int, str]]:
    """Return the axes that may count layers in all of these arrays: axis, length and evidence."""
    weights = {name: shape for name, shape in shapes.items() if jnp.issubdtype(tensors[name].dtype, jnp.inexact)}
    if any(len(shape) == 2 and _is_matrix(name, weights) for name, shape in weights.items()):
        return []
    found = []
    for axis in _AXES:
        # Counts and keys of random numbers may be of another length, but have the axis too.
        if any(len(shape) <= axis for shape in shapes.values()):
            continue
        lengths = {shape[axis] for shape in weights.values()}
        if len(lengths) == 1 and min(lengths) > 1 and (evidence := _evidence(prefix, weights, axis, tensors)):
            found.append((axis, *lengths, evidence))
    return found


def _evidence(prefix: str, shapes: Shapes, axis: int, tensors: Mapping[str, TensorInfo]) -> str:
    """Return what says that an axis of all these arrays counts layers: two modules of them, one of weights at least."""
    layer = {name: _without(axis, shape) for name, shape in shapes.items()}
    shown = {name: f"{name[len(prefix) :]} {tensors[name].shape}" for name in shapes}
    told, widths = [], set()
    for name, bias in _with_bias(shapes):
        is_wider = len(layer[name]) > len(layer[bias]) > 0
        if is_wider and _ends_with(layer[name], layer[bias]) and not _ends_with(shapes[name], shapes[bias]):
            told.append(f"{shown[name]} has the bias {tensors[bias].shape}")
            widths.update(layer[name])
    for query, out in _attentions(shapes):
        if len(layer[query]) == len(layer[out]) == 3 and layer[query][1:] == layer[out][:2]:
            told.append(f"{shown[query]} fits {shown[out]}")
            widths.update(layer[query])
    if not told and (pair := _back_and_forth(layer)):
        told.append(" and ".join(shown[name] for name in pair))
        widths.update(layer[pair[0]])
    norms = [name for name, shape in layer.items() if len(shape) == 1 and widths.issuperset(shape)]
    others = [f"the norm {shown[name]}" for name in norms if _is_scale(name, shapes)] or told[1:]
    return f"{told[0]}, {others[0]}" if told and others else ""


def _without(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _is_matrix(name: str, shapes: Shapes) -> bool:
    """Tell whether an array of two axes would be a matrix by its name: then it is no stack of vectors."""
    return re.split(r"[/.]", name)[-1] in _MATRICES and not is_norm(name, shapes)


def _is_scale(name: str, shapes: Shapes) -> bool:
    leaf = re.split(r"[/.]", name)[-1]
    return leaf == "scale" or (leaf != "bias" and is_norm(name, shapes))


def _with_bias(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield weights with their biases, but for those of convolutions that share nothing between positions."""
    for name in shapes:
        match = re.fullmatch(r"(.*[/.])?(kernel|w)", name)
        bias = f"{match[1] or ''}{_BIASES[match[2]]}" if match else ""
        if bias in shapes and not re.search("(?i)conv_?local|local_?conv", name):
            yield name, bias


def _attentions(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield the kernels of query and out of Flax's attention."""
    for name in shapes:
        out = re.sub(r"(^|[/.])query([/.]kernel)$", r"\1out\2", name)
        if out != name and out in shapes:
            yield name, out


def _back_and_forth(layer: Shapes) -> tuple[str, str] | None:
    """Return two arrays that are, in each layer, (a, b) and (b, a), as in blocks without biases.

    There is a third shape too: heads that are apart have the two of their projections alone.
    """
    first: dict[tuple[int, ...], str] = {}
    for name, shape in layer.items():
        if len(shape) == 2:
            first.setdefault(shape, name)
    both = [shape for shape in first if shape[0] < shape[1] and shape[::-1] in first]
    return (first[both[0]], first[both[0][::-1]]) if both and len(first) > 2 else None


def _ends_with(shape: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return len(end) <= len(shape) and shape[len(shape) - len(end) :] == end
