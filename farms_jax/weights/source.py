"""Weights on disk, whatever their format: named arrays, read one at a time."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from farms_jax._axes import LeafAxes, layer_of
from farms_jax._axis_rules import AxisRules
from farms_jax._names import natural_key
from farms_jax.errors import InputError, printable
from farms_jax.weights.reading import TensorInfo, check_name
from farms_jax.weights.skipped import not_weights


class WeightSource(ABC):
    """Weights on disk; closed at the end of a `with` block.

    Attributes:
        name: Name to show.
        path: Path of the file or folder.
        format: safetensors, gguf, torch, orbax, msgpack or npz; pytree in memory.
        axes: What the axes of the arrays count, as `farms_jax.analyze` takes it.
        stack: Which of them count layers, likewise.
        tensors: Full name -> dtype and shape, in natural order: `layer2` before `layer10`.
        skipped: Name -> why an array is no weight of the model, such as "optimiser state".
        listed: Full names as the file lists them.
        in_order: Whether files of this format list arrays as they were put into them, such as in the network's order.
    """

    in_order: ClassVar[bool] = False

    def __init__(self, path: Path, name: str, format: str, axes: Any, tensors: Mapping[str, TensorInfo]) -> None:
        """Check the tensors, given in any order.

        `axes` may be a function of the tensors that are weights.

        Raises:
            InputError: There are none, or a name cannot be shown.
        """
        if not tensors:
            raise InputError(f"{path}: there are no arrays in it; give the checkpoint of a model")
        for tensor in tensors:
            check_name(tensor, str(path))
        self.path, self.name, self.format, self.listed = path, name, format, tuple(tensors)
        self.tensors = {tensor: tensors[tensor] for tensor in sorted(tensors, key=natural_key)}
        self.skipped = not_weights(self.tensors)
        if callable(axes):
            axes = axes({tensor: info for tensor, info in self.tensors.items() if tensor not in self.skipped})
        self.axes = self._own_axes = axes
        self.stack: Any = None
        self._held: tuple[tuple[Any, ...], np.ndarray] | None = None  # what layers are cut out of

    def declare(self, axes: Any = None, stack: Any = None) -> None:
        """Say what the axes of the arrays count, as `farms_jax.analyze` takes it; what is `None` stays as it is.

        Where no default is in `AxisRules`, what their patterns do not match goes by the format.
        """
        if isinstance(axes, AxisRules) and axes.default is None:
            own = self._own_axes if isinstance(self._own_axes, AxisRules) else AxisRules(default=self._own_axes)
            spellings, stacks = {**axes.axes, **own.axes}, {**axes.stack, **own.stack}
            axes = dataclasses.replace(axes, axes=spellings, stack=stacks, default=own.default)
        self.axes, self.stack = self.axes if axes is None else axes, self.stack if stack is None else stack

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: A key of `tensors`.

        Returns:
            New array of the tensor's dtype and shape; bfloat16 is that of `ml_dtypes`.

        Raises:
            InputError: There is no such tensor, or it cannot be read.
        """
        if name not in self.tensors:
            raise InputError(
                f"{self.path}: there is no tensor {printable(name)} among its {len(self.tensors)}; check the name"
            )
        self._held = None  # before memory holds another one
        return self._read(name)

    def read_layer(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray:
        """Read one layer of a tensor that may hold a stack of them.

        Where the format allows, the layer alone is read; else the tensor, once for all layers that are read in a row.

        Args:
            name: A key of `tensors`.
            axes: What the tensor's axes count.
            index: Index of the layer in the stack; empty where the tensor is one layer.

        Returns:
            New array, without the axes of the stack.

        Raises:
            InputError: As for `read`.
        """
        if not index:
            return self.read(name)
        if (part := self._read_part(name, axes, index)) is not None:
            return part
        if self._held is None or self._held[0] != (name,):
            self._held = (name,), self.read(name)
        return layer_of(self._held[1], axes, index).copy()

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        """Read one layer alone; `None` where that takes the whole tensor."""
        del name, axes, index
        return None

    @abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """Read a tensor that exists."""

    def close(self) -> None:  # noqa: B027
        """Do nothing: every format opens its files anew for each tensor."""

    def __enter__(self) -> Self:
        """Return the source itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
