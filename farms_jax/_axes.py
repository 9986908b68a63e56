"""Which axes of a weight make matrices, and the weight as a stack of them.

One letter per axis everywhere in this package: L layers in one leaf, K kernel positions, R rows (outputs), C columns
(inputs). A Flax convolution kernel of shape (3, 3, 64, 128) becomes (L, K, R, C) = (1, 9, 128, 64); a Flax dense kernel
(64, 128) becomes (1, 1, 128, 64); the same weights of Torch, (128, 64, 3, 3) and (128, 64), become the same under
`TORCH_AXES`; twelve dense kernels stacked by `nn.scan`, (12, 64, 128), become (12, 1, 128, 64).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a 2-D weight or a 4-D kernel are the rows (outputs) and columns (inputs).

    The other two axes of a kernel are its positions. Weights with other axes are declared leaf by leaf: `AxisRules`.

    Attributes:
        rows: axis of the outputs.
        cols: axis of the inputs.

    Raises:
        ValueError: `rows` and `cols` are the same axis.
    """

    rows: int
    cols: int

    def __post_init__(self):
        if self.rows == self.cols:
            raise ValueError(f"Axes: rows and cols must be different axes, got {self.rows} for both")

    def of(self, ndim: int) -> LeafAxes:
        """Return what the axes of a leaf with `ndim` axes count."""
        return LeafAxes((self.rows % ndim,), (self.cols % ndim,))


class LeafAxes(NamedTuple):
    """What the axes of one leaf count; those that are not named are kernel positions.

    Several axes of one kind are merged in their order here, the last one fastest.

    Attributes:
        outputs: axes of the rows.
        inputs: axes of the columns.
        stack: axes that count layers, experts or seeds; each index is a layer of its own.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    stack: tuple[int, ...] = ()

    def positions(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of kernel positions of a leaf with `ndim` axes."""
        named = {*self.outputs, *self.inputs, *self.stack}
        return tuple(axis for axis in range(ndim) if axis not in named)

    def is_kernel(self, ndim: int) -> bool:
        """Tell whether a leaf with `ndim` axes has kernel positions."""
        return len(self.positions(ndim)) > 0

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths of the stack's axes in a leaf of this shape."""
        return tuple(shape[axis] for axis in self.stack)

    def indices(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the L indices of the stack of a leaf of this shape: one, the empty one, where it has none."""
        return list(np.ndindex(*self.stack_shape(shape)))

    def of_layer(self, ndim: int) -> LeafAxes:
        """Return what the axes of one layer count, cut out of a leaf with `ndim` axes."""
        kept = [axis for axis in range(ndim) if axis not in self.stack]
        return LeafAxes(tuple(map(kept.index, self.outputs)), tuple(map(kept.index, self.inputs)))

    def matrices_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return (L, K, R, C) of a leaf of this shape."""
        groups = self.stack, self.positions(len(shape)), self.outputs, self.inputs
        layers, positions, rows, cols = (math.prod(shape[axis] for axis in group) for group in groups)
        return layers, positions, rows, cols


FLAX_AXES = Axes(rows=-1, cols=-2)
"""(..., inputs, outputs): Flax, Haiku."""

TORCH_AXES = Axes(rows=0, cols=1)
"""(outputs, inputs, ...): Torch checkpoints, Equinox."""


MLX_AXES = Axes(rows=0, cols=-1)
"""(outputs, ..., inputs): MLX."""


def as_matrices(weight: Any, axes: LeafAxes) -> Any:
    """Return the matrices of a leaf, a numpy or jax array: shape (L, K, R, C), same dtype."""
    order = *axes.stack, *axes.positions(weight.ndim), *axes.outputs, *axes.inputs
    return weight.transpose(order).reshape(axes.matrices_shape(weight.shape))


def from_matrices(matrices: Any, axes: LeafAxes, shape: tuple[int, ...]) -> Any:
    """Return the leaf of this shape whose matrices (L, K, R, C) these are: the inverse of `as_matrices`."""
    order = *axes.stack, *axes.positions(len(shape)), *axes.outputs, *axes.inputs
    return matrices.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def layer_of(weight: Any, axes: LeafAxes, index: tuple[int, ...]) -> Any:
    """Return one layer of a leaf, at an index of its stack; the leaf itself where it has none."""
    place = dict(zip(axes.stack, index, strict=True))
    return weight[tuple(place.get(axis, slice(None)) for axis in range(len(weight.shape)))] if place else weight
