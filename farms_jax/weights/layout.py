"""In what order a checkpoint's kernels have their axes: by its metadata, the names of its arrays and their shapes.

Torch stores (outputs, inputs, h, w), Flax and Keras (h, w, inputs, outputs), MLX (outputs, h, w, inputs), and any of
them may have written a file that does not say which.

>>> import numpy as np
>>> kernel = {"conv/w": TensorInfo(np.dtype("float32"), (3, 3, 64, 128))}
>>> layout_of(kernel, {}, "torch").doubt
'the shape of conv/w (3, 3, 64, 128) is read as (h, w, inputs, outputs), as Flax and Keras store kernels'
>>> layout_of(kernel, {"format": "flax"}, "torch").doubt
''
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from farms_jax._axes import FLAX_AXES
from farms_jax._torch_axes import mlx, torch
from farms_jax.errors import printable
from farms_jax.weights.reading import TensorInfo

_AXES: dict[str, Callable[[Any], Any]] = {"torch": torch, "flax": lambda _: FLAX_AXES, "mlx": mlx}
_IN_WORDS = {
    "torch": "(outputs, inputs, h, w), as Torch stores kernels",
    "flax": "(h, w, inputs, outputs), as Flax and Keras store kernels",
    "mlx": "(outputs, h, w, inputs), as MLX stores kernels",
}
_POSITIONS = {"torch": (2, 3), "flax": (0, 1), "mlx": (1, 2)}  # axes of a kernel that has four
_LARGEST = 32  # positions along an axis
_FORMATS = {"pt": "torch", "torch": "torch", "flax": "flax", "jax": "flax", "tf": "flax", "keras": "flax", "mlx": "mlx"}
_KERNEL = re.compile(r"(.*[/.])?(\w+_)?kernel(:0)?")


class Layout(NamedTuple):
    """What the axes of a checkpoint's arrays count.

    Attributes:
        axes: as `farms_jax.analyze` takes them.
        doubt: on what they rest, where that is the shapes alone; else empty.
    """

    axes: Any
    doubt: str


def layout_of(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any], usual: str) -> Layout:
    """Return the layout of a checkpoint.

    Args:
        tensors: its weights.
        metadata: what the file says of itself, such as `{"format": "pt"}`.
        usual: torch, flax or mlx: what is usual in the format.
    """
    told = _FORMATS.get(str(metadata.get("format")))
    if told is None and any(map(_KERNEL.fullmatch, tensors)):
        return Layout(FLAX_AXES, "")
    votes: Counter[str] = Counter()
    for name, info in tensors.items():
        candidates = _candidates(name, info.shape)
        votes.update(dict.fromkeys(candidates, 6 // max(1, len(candidates))))
    chosen = told or usual
    if votes[chosen] == max(votes.values(), default=0):
        return Layout(_AXES[chosen](tensors), "")
    chosen = votes.most_common(1)[0][0]
    name, info = next((name, info) for name, info in tensors.items() if chosen in _candidates(name, info.shape))
    return Layout(_AXES[chosen](tensors), f"the shape of {printable(name)} {info.shape} is read as {_IN_WORDS[chosen]}")


def _candidates(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return in which layouts an array of four axes can be a kernel: those in which its positions are a small square.

    >>> _candidates("weight", (64, 3, 7, 7)), _candidates("weight", (3, 3, 3, 32)), _candidates("w", (64, 4, 4, 16))
    (['torch'], ['flax', 'mlx'], [])
    """
    # An array with one axis is a scale that was given four.
    if len(shape) != 4 or name.endswith("kernel") or sum(size > 1 for size in shape) < 2:
        return []
    sides = {kind: shape[a] for kind, (a, b) in _POSITIONS.items() if shape[a] == shape[b] <= _LARGEST}
    if not name.endswith("weight"):  # as MLX calls all of them
        sides.pop("mlx", None)
    return [kind for kind, side in sides.items() if side == min(sides.values())]
