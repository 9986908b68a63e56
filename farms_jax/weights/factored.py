"""Weights that a checkpoint stores as several arrays, which the network multiplies out: norms, masks, spectral norms.

The names and shapes of the arrays tell the rule: weight normalisation (Salimans and Kingma 2016) of Torch, Linen, NNX
and Equinox; spectral normalisation (Miyato et al. 2018) and the masks of `torch.nn.utils.prune`. What other
parametrisations of Torch make of a weight is in their code alone: such weights are left out with the reason.

>>> import numpy as np
>>> matrix, column = TensorInfo(np.dtype("float32"), (3, 4)), TensorInfo(np.dtype("float32"), (3, 1))
>>> find({"up.weight_v": matrix, "up.weight_g": column}).weights["up.weight"].parts
{'direction': 'up.weight_v', 'length': 'up.weight_g'}
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from farms_jax.weights.quantised import Found
from farms_jax.weights.quantised_rules import Weight
from farms_jax.weights.reading import TensorInfo

_PARAMETRISED = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)")
_UNKNOWN = (
    "parametrised by a rule that the checkpoint does not tell; save the model after "
    "torch.nn.utils.parametrize.remove_parametrizations"
)
_FLAX_EPSILON = 1e-12

Tensors = Mapping[str, TensorInfo]


def find(tensors: Tensors) -> Found:
    """Find the weights that are stored as factors.

    Args:
        tensors: stored array -> dtype and shape, all of the checkpoint.

    Returns:
        The weights, whose main array is the first of their parts; those whose rule is not known, and what is beside
        them for their sake.
    """
    found = Found({}, {}, {})
    for name, info in tensors.items():
        if not info.shape or not jnp.issubdtype(info.dtype, jnp.inexact):
            continue
        weight = next((weight for rule in _RULES if (weight := rule(name, tensors))), None)
        if weight is None:
            continue
        if weight.method == _UNKNOWN:
            found.unread[name] = _UNKNOWN
            found.parts.update(dict.fromkeys(weight.parts.keys() - {name}, told_of(weight.name)))
        elif weight.name not in tensors or weight.name in weight.parts.values():
            found.weights[weight.name] = weight
    return found


def told_of(name: str) -> str:
    """Return what an array is that a weight of this name is made of."""
    return f"factor of the weight {name}"


def _weight(name: str, info: TensorInfo, parts: dict[str, str], decode: Callable[..., np.ndarray], way: str) -> Weight:
    """Return a weight of the shape of its main array, in float32 unless that is wider."""
    wide = info.dtype if info.dtype.char in "dFD" else np.dtype(np.float32)

    def exact(**arrays: np.ndarray) -> np.ndarray:
        arrays = {part: array if array.dtype == bool else array.astype(wide) for part, array in arrays.items()}
        return decode(**arrays).astype(wide, copy=False)

    return Weight(name, TensorInfo(wide, info.shape), parts, exact, way)


def _normed(direction: np.ndarray, length: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    """Return a direction with the lengths that its norms over all axes along which they are one are to have."""
    length = length.reshape(length.shape or (1,) * direction.ndim)
    axes = tuple(axis for axis, size in enumerate(length.shape) if size == 1)
    squares = np.square(np.abs(direction).astype(np.float64)).sum(axes, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a direction of length 0 is NaN in the network too
        return direction * (length / np.sqrt(squares + epsilon))


def _fits(length: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return not length or (
        len(length) == len(shape) and all(own in {1, size} for own, size in zip(length, shape, strict=True))
    )


def torch_weight_norm(name: str, tensors: Tensors) -> Weight | None:
    """Weight norm of Torch: `NAME_g` and `NAME_v`, or `parametrizations.NAME.original0` and `original1`."""
    ends = (("_v", "_g"), (".original1", ".original0"))
    for own, other in ends:
        length = name.removesuffix(own) + other
        if not name.endswith(own) or length not in tensors:
            continue
        parts, whole = {"direction": name, "length": length}, name.removesuffix(own)
        if own == ".original1":
            if not (match := _PARAMETRISED.fullmatch(name)) or _has_more(name.removesuffix("original1"), "01", tensors):
                return None
            whole = match[1] + match[2]
        info = tensors[name]
        if _fits(tensors[length].shape, info.shape):
            return _weight(whole, info, parts, _normed, "weight norm")
    return None


def _has_more(start: str, numbers: str, tensors: Tensors) -> bool:
    """Tell whether parametrisations of these numbers have arrays of their own, below what their names start with."""
    return any(other.startswith(tuple(f"{start}{number}." for number in numbers)) for other in tensors)


def torch_mask(name: str, tensors: Tensors) -> Weight | None:
    """A pruned weight of `torch.nn.utils.prune`: `NAME_orig` times `NAME_mask`."""
    whole = name.removesuffix("_orig")
    mask = f"{whole}_mask"
    if whole == name or mask not in tensors or tensors[mask].shape != tensors[name].shape:
        return None
    return _weight(whole, tensors[name], {"weight": name, "mask": mask}, lambda weight, mask: weight * mask, "mask")


def torch_spectral_norm(name: str, tensors: Tensors) -> Weight | None:
    """Spectral norm of Torch: `NAME_orig`, `NAME_u`, `NAME_v`, or `parametrizations.NAME.original`, `0._u`, `0._v`.

    Returns:
        W / sigma as in evaluation, sigma = u' M v, of the matrix M whose rows are an axis of W.
    """
    if name.endswith("_orig"):
        whole = name.removesuffix("_orig")
        left, right = f"{whole}_u", f"{whole}_v"
    elif (match := _PARAMETRISED.fullmatch(name)) and match[3] == "original":
        start, whole = name.removesuffix("original"), match[1] + match[2]
        if _has_more(start, "1", tensors):
            return None
        left, right = f"{start}0._u", f"{start}0._v"
    else:
        return None
    if left not in tensors or right not in tensors:
        return None
    shape = tensors[name].shape
    size = int(np.prod(shape))
    rows, cols = tensors[left].shape, tensors[right].shape
    axes = [axis for axis, length in enumerate(shape) if (length,) == rows and (size // length,) == cols]
    if not axes:
        return None

    def decode(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        # Of axes that are equally long the one along which the vectors are singular ones.
        matrices = (np.moveaxis(weight, axis, 0).reshape(len(left), -1) for axis in axes)
        return weight / max((left @ matrix @ right for matrix in matrices), key=np.abs)

    parts = {"weight": name, "left": left, "right": right}
    return _weight(whole, tensors[name], parts, decode, "spectral norm")


def torch_parametrised(name: str, tensors: Tensors) -> Weight | None:
    """Any other weight below `parametrizations`: its method is `_UNKNOWN`, and all arrays there are its parts."""
    match = _PARAMETRISED.fullmatch(name)
    if match is None:
        return None
    start = name.removesuffix(match[3])
    main = next((own for own in ("original", "original1", "original0") if start + own in tensors), "")
    if match[3] != main:
        return None
    parts = {other: other for other in tensors if other.startswith(start)}
    return Weight(match[1] + match[2], tensors[name], parts, lambda **_: np.zeros(0), _UNKNOWN)


def equinox_weight_norm(name: str, tensors: Tensors) -> Weight | None:
    """Weight norm of Equinox: `layer/weight` with `g`, which has one for all axes but that of the outputs."""
    at = f"/{name}".rfind("/layer/")
    length = f"{name[: max(at, 0)]}g"
    if at < 0 or length not in tensors or len(tensors[length].shape) < 2:
        return None
    info = tensors[name]
    if not _fits(tensors[length].shape, info.shape):
        return None
    return _weight(name, info, {"direction": name, "length": length}, _normed, "weight norm")


def flax_weight_norm(name: str, tensors: Tensors) -> Weight | None:
    """Weight norm of Flax, where the lengths are those of the last axis; the name given is theirs.

    In Linen `Dense_0/kernel` with `WeightNorm_0/Dense_0/kernel/scale`, in NNX `layer_instance/kernel` with
    `scales/kernel`.

    Returns:
        The weight; `None` where an array is no such lengths.
    """
    kernels = []
    if name.endswith("/kernel/scale"):
        whole = name.removesuffix("/scale")
        starts = [0, *(match.end() for match in re.finditer("/", whole))]
        kernels = [whole[:start] + whole[end:] for start, end in pairwise(starts)]
    elif (at := f"/{name}".rfind("/scales/")) >= 0:
        kernels = [f"{name[:at]}layer_instance/{name[at + len('scales/') :]}"]
    for kernel in kernels:
        if kernel in tensors and tensors[name].shape in {(), tensors[kernel].shape[-1:]}:
            parts = {"direction": kernel, "length": name}
            return _weight(kernel, tensors[kernel], parts, _normed_flax, "weight norm")
    return None


def _normed_flax(direction: np.ndarray, length: np.ndarray) -> np.ndarray:
    length = length.reshape((1,) * (direction.ndim - 1) + (-1,)) if length.ndim else length
    return _normed(direction, length, _FLAX_EPSILON)


_RULES: tuple[Callable[[str, Tensors], Weight | None], ...] = (
    *(torch_weight_norm, torch_mask, torch_spectral_norm, torch_parametrised),
    *(equinox_weight_norm, flax_weight_norm),
)
