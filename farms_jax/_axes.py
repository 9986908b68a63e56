"""A weight as a stack of matrices.

One letter per axis everywhere in this package: K kernel positions, R rows, C columns. A Flax
convolution kernel of shape (3, 3, 64, 128) becomes a stack (K, R, C) = (9, 128, 64); a Flax dense
kernel (64, 128) becomes (1, 128, 64); the same weights of Torch, (128, 64, 3, 3) and (128, 64),
become the same stacks under `TORCH_AXES`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a weight are the rows (outputs) and columns (inputs); all others are kernel positions.

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

    def permutation(self, ndim: int) -> tuple[int, ...]:
        """Return the order of axes (positions..., rows, cols) for a weight of `ndim` axes."""
        rows, cols = self.rows % ndim, self.cols % ndim
        return *(axis for axis in range(ndim) if axis not in {rows, cols}), rows, cols

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (K, R, C) of a weight's stack of matrices."""
        *positions, rows, cols = (shape[axis] for axis in self.permutation(len(shape)))
        return math.prod(positions), rows, cols


LAYER_NDIMS = (2, 4)  # a matrix, a convolution kernel

FLAX_AXES = Axes(rows=-1, cols=-2)
"""(..., inputs, outputs): Flax, Haiku."""

TORCH_AXES = Axes(rows=0, cols=1)
"""(outputs, inputs, ...): Torch checkpoints, Equinox."""


def is_kernel(weight: Any) -> bool:
    """Tell whether a weight, anything with a shape, is a convolution kernel."""
    return len(weight.shape) == 4


def as_matrices(weight: Any, axes: Axes) -> Any:
    """Stack the matrices of a weight, a numpy or jax array: shape (K, R, C), same dtype."""
    return weight.transpose(axes.permutation(weight.ndim)).reshape(axes.stack_shape(weight.shape))
