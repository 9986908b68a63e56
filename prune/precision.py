"""The precision of the written model: that of its source, or the one that `--dtype` names."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax.errors import InputError, listed

from .checkpoints import Checkpoint, ConvertedCheckpoint, GGUFCheckpoint
from .config import Dtype

_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PLAIN = {"F64": "float32", "F32": "float32", "BF16": "bfloat16"}  # kinds of GGUF that have a dtype of their own
_LEAST, _MOST = (float(limit) for limit in (np.finfo(np.float16).tiny, np.finfo(np.float16).max))


class Precision(NamedTuple):
    """A dtype for the written model."""

    dtype: str | None  # None: every tensor as it is stored
    reason: str  # in words


def choose_precision(asked: Dtype, checkpoint: Checkpoint, largest: Mapping[str, float] | None) -> Precision:
    """Return the dtype to write.

    Asked for the source's, a folder's tensors stay as they are, and so does a GGUF file in F32 or BF16. Quantised
    weights (and F16) become float16, whose numbers of 11 significant bits round them least among those of two bytes;
    bfloat16 (8 bits) where a tensor needs its range: its largest magnitude, by name in `largest`, is above 65504, the
    most that float16 holds, or below 6.1e-5, where float16 loses digits. Without `largest`, all are taken to fit.

    Raises:
        InputError: float16 is asked for, and cannot hold a tensor.
    """
    beyond = [name for name, value in (largest or {}).items() if value > _MOST]
    if asked == "float16" and beyond:
        raise InputError(
            f"--dtype float16 holds no number above {_MOST:.0f}, which {listed(beyond, 3, ', ')} of {checkpoint.name} "
            "has; give --dtype bfloat16"
        )
    if asked != "source":
        return Precision(asked, "as asked for")
    if not isinstance(checkpoint, GGUFCheckpoint):
        return Precision(None, "as the source")
    kind = _main_kind(checkpoint)
    if kind in _PLAIN:
        return Precision(_PLAIN[kind], f"the source is {kind}")
    small = [name for name, value in (largest or {}).items() if 0 < value < _LEAST]
    if outside := [*beyond, *small]:
        return Precision("bfloat16", f"the source is {kind}; float16 has no range for {listed(outside, 3, ', ')}")
    return Precision("float16", f"the source is {kind}; float16 has its range, and rounds less than bfloat16")


def needs_largest(asked: Dtype, checkpoint: Checkpoint) -> bool:
    """Return whether `choose_precision` depends on the values of the weights."""
    quantised = isinstance(checkpoint, GGUFCheckpoint) and _main_kind(checkpoint) not in _PLAIN
    return asked == "float16" or (asked == "source" and quantised)


def _main_kind(checkpoint: GGUFCheckpoint) -> str:
    """Return how most weights of a file are stored."""
    counts: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        counts[checkpoint.kinds[name]] += int(np.prod(info.shape))
    return counts.most_common(1)[0][0]


def converted(checkpoint: Checkpoint, precision: Precision) -> Checkpoint:
    """Return the checkpoint in a dtype; as it is where nothing changes."""
    if precision.dtype is None:
        return checkpoint
    other = ConvertedCheckpoint(checkpoint, _DTYPES[precision.dtype])
    return checkpoint if other.tensors == checkpoint.tensors else other


def dtype_names(checkpoint: Checkpoint) -> str:
    """Return the dtypes of a checkpoint's tensors in words, that of most numbers first."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[np.dtype(info.dtype).name] += int(np.prod(info.shape))
    return " and ".join(name for name, _ in counts.most_common())


def largest_magnitude(tensor: np.ndarray[Any, Any]) -> float:
    """Return the largest magnitude of a tensor, 0 of an empty one."""
    return float(np.abs(tensor).max(initial=0))
