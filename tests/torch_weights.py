"""Weights of the reference's image networks, under our names."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from train.models import MODELS


def from_torch(model_name: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return parameters and running statistics by our names; `model_name` is a key of MODELS and checks them."""
    arrays = {}
    for name, array in state.items():
        if not name.endswith("num_batches_tracked"):
            module, _, leaf = name.rpartition(".")
            arrays[f"{module}/{_leaf(leaf, array.ndim)}".replace(".", "/")] = array.transpose(_axes(array.ndim))
    num_classes = state["linear.weight"].shape[0]
    first = next(iter(state.values()))
    network = nnx.eval_shape(
        lambda: MODELS[model_name].build(num_classes=num_classes, width=first.shape[0] / 64, rngs=nnx.Rngs(0))
    )
    expected = {name: leaf.shape for name, leaf in leaves(network).items()}
    assert {name: array.shape for name, array in arrays.items()} == expected
    return arrays


def leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a model, or of gradients of it, by name."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def load(model: nnx.Module, arrays: dict[str, np.ndarray]) -> None:
    """Puts arrays, by our names, into the model: all of it."""
    state = nnx.state(model)
    flat, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    assert set(names) == set(arrays)
    nnx.replace_by_pure_dict(state, structure.unflatten([jax.numpy.asarray(arrays[name]) for name in names]))
    nnx.update(model, state)


def _leaf(name: str, ndim: int) -> str:
    names = {"weight": "scale" if ndim == 1 else "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return names[name]


def _axes(ndim: int) -> tuple[int, ...]:
    return {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[ndim]
