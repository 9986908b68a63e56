"""Weights on disk, whatever their format: named arrays, read one at a time."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from farms_jax._axes import LeafAxes, layer_of
from farms_jax._axis_rules import AxisRules
from farms_jax._names import natural_key
from farms_jax.errors import InputError, one_line, printable
from farms_jax.weights import factored
from farms_jax.weights.layout import Layout
from farms_jax.weights.quantised import Found, find, read_config
from farms_jax.weights.reading import TensorInfo, check_name
from farms_jax.weights.skipped import OPTIONAL, not_weights
from farms_jax.weights.stacks import with_stacks


class WeightSource(ABC):
    """Weights on disk; closed at the end of a `with` block.

    Attributes:
        name: Name to show.
        path: Path of the file or folder.
        format: safetensors, gguf, torch, orbax, msgpack, keras, npz or npy; pytree in memory.
        axes: What the axes of the arrays count, as `farms_jax.analyze` takes it.
        stack: Which of them count layers, likewise.
        tensors: Full name -> dtype and shape, in natural order: `layer2` before `layer10`. Weights that several arrays
            stand for are among them under their own names, as float32.
        stored: The same of the arrays as they are stored.
        skipped: Name -> why an array is no weight of the model, such as "optimiser state".
        unread: Name -> why a weight cannot be read.
        doubt: On what `axes` rest, where that should be said: on shapes alone; empty where they were declared.
        quantisation: How weights are quantised, in words; empty where none is.
        listed: Full names as the file lists them.
        in_order: Whether files of this format list arrays as they were put into them, such as in the network's order.
    """

    in_order: ClassVar[bool] = False

    def __init__(
        self,
        path: Path,
        name: str,
        format: str,
        axes: Any,
        tensors: Mapping[str, TensorInfo],
        *,
        unread: Mapping[str, str] | None = None,
        skipped: Mapping[str, str] | None = None,
        quantisation: str = "",
    ) -> None:
        """Check the stored tensors, given in any order, of which some are known to be unreadable or no weights.

        `axes` may be a function of the tensors that are weights, which returns them or a `Layout`.

        Raises:
            InputError: There are none, or a name cannot be shown.
        """
        if not tensors:
            raise InputError(f"{path}: there are no arrays in it; give the checkpoint of a model")
        for tensor in tensors:
            check_name(tensor, str(path))
        self.path, self.name, self.format, self.listed = path, name, format, tuple(tensors)
        infos = {tensor: TensorInfo(np.dtype(info.dtype), tuple(info.shape)) for tensor, info in tensors.items()}
        self.stored = {tensor: infos[tensor] for tensor in sorted(infos, key=natural_key)}
        self.skipped = {**(skipped or {}), **not_weights(self.stored)}
        found = self._quantised()
        self._weights, self.unread = found.weights, {**found.unread, **(unread or {})}
        self.skipped |= found.parts
        self.quantisation = quantisation or found.summary()
        self._multiply_out()
        every = {**self.stored, **{weight.name: weight.info for weight in self._weights.values()}}
        self.tensors = {tensor: every[tensor] for tensor in sorted(every, key=natural_key)}
        self._sure, self._told = self._layouts(axes)
        self.axes, self.doubt = self._told
        self.stack: Any = None
        self._held: tuple[tuple[Any, ...], np.ndarray] | None = None  # what layers are cut out of

    def _layouts(self, axes: Any) -> tuple[Layout, Layout]:
        """Return what the axes count without and with stacks that only the shapes tell of."""
        if not callable(axes):
            return (sure := Layout(axes, "")), sure
        left_out = {**self.skipped, **self.unread}.keys() - self.optional
        weights = {tensor: info for tensor, info in self.tensors.items() if tensor not in left_out}
        found = axes(weights)
        sure = found if isinstance(found, Layout) else Layout(found, "")
        return sure, with_stacks(sure, weights)

    def _quantised(self) -> Found:
        weights = {tensor: info for tensor, info in self.stored.items() if tensor not in self.skipped}
        if self.path.exists():
            return find(weights, read_config(self.path if self.path.is_dir() else self.path.parent), self._read)
        found = find(weights, {}, self._read)
        for name in found.unread.keys() & self._bare(found.unread):
            del found.unread[name]  # what somebody has in memory is what it is
        return found

    def _multiply_out(self) -> None:
        """Put weights that are stored as factors in their place; those of a copy of the model are a copy too."""
        found = factored.find(self.stored)
        for name, weight in found.weights.items():
            main = next(iter(weight.parts.values()))
            if (reason := self.skipped.get(main)) not in {None, *OPTIONAL}:
                continue
            self._weights[name] = weight
            self.skipped |= {part: factored.told_of(name) for part in weight.parts.values() if part != name}
            self.skipped |= {name: reason} if reason else {}
        self.skipped = {**found.parts, **self.skipped}
        self.unread |= {name: reason for name, reason in found.unread.items() if name not in self.skipped}

    def _bare(self, names: Iterable[str]) -> set[str]:
        """Return the arrays of eight-bit floats among these."""
        return {name for name in names if self.stored[name].dtype.name.startswith("float8_")}

    @property
    def num_params(self) -> int:
        """Parameters of the model: entries of its weights, of those that are not read as they are stored."""
        counted = {
            name: info
            for name, info in self.tensors.items()
            if name in self.unread or (name not in self.skipped and jnp.issubdtype(info.dtype, jnp.inexact))
        }
        return sum(math.prod(info.shape) for info in counted.values())

    @property
    def optional(self) -> set[str]:
        """Names of arrays that are left out but can be asked for: averages and copies, eight-bit floats as they are."""
        return self._bare(self.unread) | {name for name, reason in self.skipped.items() if reason in OPTIONAL}

    def declare(self, axes: Any = None, stack: Any = None) -> None:
        """Say what the axes of the arrays count, as `farms_jax.analyze` takes it; what is `None` stays as it is.

        Where no default is in `AxisRules`, what their patterns do not match goes by the format. Of stacks nothing is
        guessed then.
        """
        if self.axes is self._told.axes and (axes is not None or stack is not None):
            self.axes, self.doubt = self._sure
        if isinstance(axes, AxisRules) and axes.default is None:
            own = self._sure.axes if isinstance(self._sure.axes, AxisRules) else AxisRules(default=self._sure.axes)
            spellings, stacks = {**axes.axes, **own.axes}, {**axes.stack, **own.stack}
            axes = dataclasses.replace(axes, axes=spellings, stack=stacks, default=own.default)
        self.doubt = self.doubt if axes is None else ""
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
        if name not in self._weights:
            return self._read(name)
        return self._decoded(name, {role: self._read(part) for role, part in self._weights[name].parts.items()})

    def _decoded(self, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            return np.ascontiguousarray(self._weights[name].decode(**parts))
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            reason = f"the arrays that it is made of do not fit together ({one_line(error)})"
            raise InputError(f"{self.path}: {name}: {reason}; download or write it again") from error

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
        if (part := self._layer_alone(name, axes, index)) is not None:
            return part
        if self._held is None or self._held[0] != (name,):
            self._held = (name,), self.read(name)
        return layer_of(self._held[1], axes, index).copy()

    def _layer_alone(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        if name not in self._weights:
            return self._read_part(name, axes, index)
        # All parts of the weight have the axes of its stack, as their first.
        stack = LeafAxes((), (), axes.stack)
        lengths, parts = stack.stack_shape(self.tensors[name].shape), self._weights[name].parts
        is_first = axes.stack == tuple(range(len(index)))
        if not is_first or any(self.stored[part].shape[: len(index)] != lengths for part in parts.values()):
            return None
        read = {role: self._read_part(part, stack, index) for role, part in parts.items()}
        known = {role: part for role, part in read.items() if part is not None}
        return self._decoded(name, known) if known.keys() == parts.keys() else None

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
