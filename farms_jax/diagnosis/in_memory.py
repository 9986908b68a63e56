"""Models in memory as sources of weights, with the axes of their frameworks: JAX's, and Torch's where it is loaded."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from farms_jax import axis_rules
from farms_jax._axes import FLAX_AXES, LeafAxes, layer_of
from farms_jax._names import is_box, named_leaves
from farms_jax.errors import InputError
from farms_jax.weights import WeightSource
from farms_jax.weights.torch_source import TorchSource
from farms_jax.weights.torch_tree import tensors_in

_NAME = "weights in memory"


class TreeSource(WeightSource):
    """A pytree in memory, read like a file."""

    in_order = True  # of fields; keys of dictionaries are in that of the alphabet

    def __init__(self, tree: Any, axes: Any = None, stack: Any = None) -> None:
        """Take the arrays of a tree; `axes` and `stack` are those of `farms_jax.analyze`."""
        # Modules have functions and numbers among their leaves, and keys of random numbers.
        self._leaves = {
            name: leaf for name, leaf in named_leaves(tree) if isinstance(getattr(leaf, "dtype", None), np.dtype)
        }
        # Functions look at the tree itself, at its modules and boxes.
        axes, stack = (declared(tree) if callable(declared) else declared for declared in (axes, stack))
        own = _axes_of(tree) if axes is None else axes
        super().__init__(Path(_NAME), _NAME, "pytree", own if axes is not None else lambda _: own, self._leaves)
        self.declare(stack=stack)

    def _read(self, name: str) -> np.ndarray:
        return np.array(self._leaves[name])

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray:
        return np.array(layer_of(np.asarray(self._leaves[name]), axes, index))


def open_in_memory(model: Any, axes: Any = None, stack: Any = None) -> WeightSource:
    """Return a model in memory as a source of weights.

    Args:
        model: a pytree, such as Flax's variables, a train state, Haiku's parameters or a module of Equinox; a module of
            NNX, or a bound one of Linen; a module, state dict or checkpoint of Torch.
        axes: what the axes of the arrays count, as `farms_jax.analyze` takes it; by default those of the framework.
        stack: which of them count layers, likewise.

    Returns:
        The source.

    Raises:
        InputError: there are no arrays in it.
    """
    if _is_torch(model):
        model = _unwrapped(model)
        name = type(model).__name__ if hasattr(model, "_modules") else _NAME
        source = TorchSource(Path(_NAME), name, "torch", tensors_in(model))
        source.declare(axes, stack)
        return source
    return TreeSource(_tree_of(model), axes, stack)


def _is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")  # what is not loaded has made nothing
    if torch is None or not hasattr(torch, "Tensor"):
        return False
    if isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        return True
    kinds = (torch.Tensor, torch.nn.Module)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(model))


def _unwrapped(model: Any) -> Any:
    """Return the module in one that spreads it over devices or compiles it, so that names are the model's own."""
    if type(model).__name__ == "ExportedProgram":
        return model.state_dict
    while type(model).__name__ in {"DataParallel", "DistributedDataParallel", "OptimizedModule"}:
        model = next(iter(model._modules.values()))
    return model


def _tree_of(model: Any) -> Any:
    """Return the arrays of a module that is no tree of JAX itself; a tree as it is."""
    if (nnx := sys.modules.get("flax.nnx")) and isinstance(model, nnx.Module):
        return nnx.state(model, nnx.Not(nnx.RngState))
    if (linen := sys.modules.get("flax.linen")) and isinstance(model, linen.Module):
        if model.scope is None:
            raise InputError(
                f"{type(model).__name__}: a Linen module has no weights in it; give its variables, as model.init "
                "returns them, or the module bound to them"
            )
        return model.variables
    return model


def _axes_of(tree: Any) -> Any:
    """Return what the axes of a tree's arrays count, by its modules and by the names that its boxes give them."""
    nodes = jax.tree.leaves(tree, is_leaf=axis_rules.is_equinox_module)
    if any(map(axis_rules.is_equinox_module, nodes)):
        return axis_rules.equinox(tree)
    if any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))):
        rules = axis_rules.logical_names(tree)
        return rules if rules.axes or rules.stack else FLAX_AXES
    return FLAX_AXES
