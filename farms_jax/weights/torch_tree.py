"""The tensors in what `torch.save` takes: modules, state dicts, and dicts and lists of anything around them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from farms_jax.errors import printable
from farms_jax.weights.skipped import OPTIMISER

# What trainings call the model, beside which they put optimiser and epoch; the surest first.
_MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
_WRAPPER = "_orig_mod"  # the module that `torch.compile` wraps


class Found(NamedTuple):
    """A tensor.

    Attributes:
        name: the keys that lead to it, joined by dots.
        tensor: a `torch.Tensor`.
        left_out: why it is no weight; empty where nothing says so.
        classes: full names of the classes of the module that it belongs to; none outside modules.
    """

    name: str
    tensor: Any
    left_out: str = ""
    classes: tuple[str, ...] = ()


def tensors_in(content: Any) -> Iterator[Found]:
    """Yield the tensors of the model in a checkpoint first, under the names that it gives them, then all others.

    Modules may be live, or what stands for them (`torch_file.Inert`).
    """
    key = next((key for key in _MODEL_KEYS if _has_model(content, key)), None)
    if key is None:
        yield from _walk(content, ())
    else:
        yield from tensors_in(content[key])
        yield from _walk({other: value for other, value in content.items() if other != key}, ())


def _has_model(content: Any, key: str) -> bool:
    if not isinstance(content, Mapping) or key not in content:
        return False
    model = content[key]
    return (isinstance(model, Mapping) or _is_module(model)) and next(_walk(model, ()), None) is not None


def _walk(node: Any, at: tuple[str, ...], left_out: str = "") -> Iterator[Found]:
    if _is_tensor(node):
        yield Found(".".join(at), node, left_out)
    elif _is_module(node):
        yield from _walk_module(node, at, left_out)
    elif isinstance(node, Mapping):
        # As `Optimizer.state_dict()` returns it, whatever the training calls it.
        left_out = left_out or (OPTIMISER if {"state", "param_groups"} <= node.keys() else "")
        for key, child in node.items():
            yield from _walk(child, (*at, printable(str(key))), left_out)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _walk(child, (*at, str(index)), left_out)


def _walk_module(
    module: Any, at: tuple[str, ...], left_out: str, parametrised: tuple[str, ...] = ()
) -> Iterator[Found]:
    """Yield what is in a module; the classes of one that is parametrised are those of its original weights."""
    classes = parametrised or tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    for name, tensor in module._parameters.items():
        if _is_tensor(tensor):
            yield Found(".".join((*at, name)), tensor, left_out, classes)
    for name, tensor in module._buffers.items():
        if _is_tensor(tensor):
            yield Found(".".join((*at, name)), tensor, left_out or "buffer of a module, no parameter")
    for name, child in module._modules.items():
        if _is_module(child):
            inside = at if name == _WRAPPER else (*at, name)
            passed = classes if parametrised or name == "parametrizations" else ()
            yield from _walk_module(child, inside, left_out, passed)


def _is_tensor(node: Any) -> bool:
    import torch

    return isinstance(node, torch.Tensor)


def _is_module(node: Any) -> bool:
    return all(hasattr(node, part) for part in ("_parameters", "_buffers", "_modules"))
