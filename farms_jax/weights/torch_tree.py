"""The tensors in what `torch.save` takes: modules, state dicts, and dicts and lists of anything around them."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from farms_jax.errors import printable
from farms_jax.weights.factored import told_of
from farms_jax.weights.skipped import BESIDE, COPY, OPTIMISER

# What trainings call the model, beside which they put optimiser, epoch, losses; the surest first.
_WHOLE_MODEL_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
_MODEL_KEYS = (
    *_WHOLE_MODEL_KEYS,
    *("module", "net", "network", "params"),  # beside which other parts of a model may be
    "student",  # beside the teacher, which is its average
)
_OPTIMISER_KEY = re.compile(r"(?i)opt|(.*_)?optim(izer)?s?(_.*)?")
_WRAPPER = "_orig_mod"  # the module that `torch.compile` wraps
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)*")


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
        return
    yield from (model := list(tensors_in(content[key])))
    beside = list(_walk({other: value for other, value in content.items() if other != key}, ()))
    copies = tuple(_copies(model, beside))
    parts = () if key in _WHOLE_MODEL_KEYS else tuple(_parts(content))
    for item in beside:
        reason = COPY if item.name.startswith(copies) else "" if item.name.startswith(parts) else BESIDE
        yield item._replace(left_out=item.left_out or reason)


def _parts(content: Mapping[Any, Any]) -> Iterator[str]:
    """Yield what the names begin with of the modules and state dicts in a checkpoint."""
    for key, value in content.items():
        if isinstance(value, Mapping) or _is_module(value):
            yield f"{printable(str(key))}."


def _copies(model: Iterable[Found], beside: Iterable[Found]) -> Iterator[str]:
    """Yield what the names begin with where all matrices of the model are there a second time: averages, teachers."""
    originals = {_WRAPPERS.sub("", item.name): item.tensor.shape for item in model if item.tensor.dim() > 1}
    others = {item.name: item.tensor.shape for item in beside if item.tensor.dim() > 1}
    first = next(iter(originals), None)
    for start in [name.removesuffix(first) for name in others if name.endswith(f".{first}")] if first else []:
        if all(others.get(start + name) == shape for name, shape in originals.items()):
            yield start


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
            named = isinstance(child, Mapping | list) and _OPTIMISER_KEY.fullmatch(str(key)) is not None
            yield from _walk(child, (*at, printable(str(key))), left_out or (OPTIMISER if named else ""))
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
    buffers = {name: tensor for name, tensor in module._buffers.items() if _is_tensor(tensor)}
    # Where weights are packed into integers, they and their scales are buffers.
    packed = any(t.dim() > 1 and str(t.dtype).startswith(("torch.int", "torch.uint")) for t in buffers.values())
    for name, tensor in buffers.items():
        yield Found(".".join((*at, name)), tensor, left_out or ("" if packed else "buffer of a module, no parameter"))
    for name, child in module._modules.items():
        if name == "parametrizations":
            for own, parametrisation in child._modules.items():
                whole, inside = ".".join((*at, own)), (*at, name, own)
                made = _made_by(parametrisation)
                if made is not None:
                    yield Found(whole, made, left_out, classes)
                told = left_out if made is None else left_out or told_of(whole)
                yield from _walk_module(parametrisation, inside, told, classes)
        elif _is_module(child):
            inside = at if name == _WRAPPER else (*at, name)
            yield from _walk_module(child, inside, left_out, classes if parametrised else ())


def _made_by(parametrisation: Any) -> Any:
    """Return the weight that a live parametrisation makes in evaluation; `None` for what stands for one of a file."""
    from torch import no_grad
    from torch.nn.utils.parametrize import ParametrizationList

    if not isinstance(parametrisation, ParametrizationList):
        return None
    try:
        with no_grad():  # a copy: a spectral norm that trains changes its vectors whenever it is asked
            return copy.deepcopy(parametrisation).eval()()
    except Exception:  # of any kind: the code is the user's; the names of its arrays may tell
        return None


def _is_tensor(node: Any) -> bool:
    import torch

    return isinstance(node, torch.Tensor)


def _is_module(node: Any) -> bool:
    return all(hasattr(node, part) for part in ("_parameters", "_buffers", "_modules"))
