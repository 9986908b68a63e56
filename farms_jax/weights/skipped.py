"""Tell a model's weights from what else is in a checkpoint: optimiser states, averages, running statistics.

>>> import numpy as np
>>> matrix, count = TensorInfo(np.dtype("float32"), (3, 4)), TensorInfo(np.dtype("int32"), ())
>>> not_weights({"params/w": matrix, "opt_state/0/trace/w": matrix})
{'opt_state/0/trace/w': 'optimiser state'}
>>> not_weights({"0/w": matrix, "1/0/count": count, "1/0/mu/w": matrix, "1/0/nu/w": matrix})
{'1/0/count': 'optimiser state', '1/0/mu/w': 'optimiser state', '1/0/nu/w': 'optimiser state'}
>>> not_weights({"encoder/mu/w": matrix, "encoder/logvar/w": matrix})
{}
"""

import re
from collections.abc import Iterable, Mapping

from farms_jax.weights.reading import TensorInfo

OPTIMISER, STATISTICS, AVERAGE = "optimiser state", "running statistics", "moving average of the weights"
_ALWAYS = {
    **dict.fromkeys(("opt_state", "optimizer", "optimizer_state", "optim_state", "optimizer_states"), OPTIMISER),
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), OPTIMISER),
    **dict.fromkeys(("batch_stats", "running_mean", "running_var", "num_batches_tracked"), STATISTICS),
}
# Words that modules may have too: they count only where the same arrays are elsewhere in the checkpoint.
_WHERE_MIRRORED = {
    **dict.fromkeys(("trace", "momentum", "velocity"), OPTIMISER),
    **dict.fromkeys(("ema", "ema_params", "params_ema", "ema_model", "model_ema", "state_dict_ema"), AVERAGE),
}
_ADAM = frozenset({"mu", "nu", "ema", "count"})  # fields of optax's states that count their steps

_Path = tuple[str, ...]


def not_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return name -> reason of those arrays that are no weights; parts of a name are separated by `/` or `.`."""
    paths = {name: tuple(re.split(r"[/.]", name)) for name in tensors}
    shapes = {path: tensors[name].shape for name, path in paths.items()}
    integers = {name for name, info in tensors.items() if info.shape == () and info.dtype.kind in "iu"}
    counted = {path[:-1] for name, path in paths.items() if path[-1] == "count" and name in integers}
    mirrors = _mirrors(shapes)
    return {name: reason for name, path in paths.items() if (reason := _reason(path, counted, mirrors)) is not None}


def _reason(path: _Path, counted: Iterable[_Path], mirrors: Mapping[_Path, str]) -> str | None:
    for end, part in enumerate(path, start=1):
        if part in _ALWAYS:
            return _ALWAYS[part]
        if path[:end] in mirrors:
            return mirrors[path[:end]]
        # At the root it would be the model's own.
        if end > 1 and part in _ADAM and path[: end - 1] in counted:
            return OPTIMISER
    return None


def _mirrors(shapes: Mapping[_Path, tuple[int, ...]]) -> dict[_Path, str]:
    """Return path -> reason of subtrees that are named as copies and whose original is in the checkpoint."""
    inside: dict[_Path, list[_Path]] = {}
    for path in shapes:
        for end, part in enumerate(path[:-1], start=1):
            if part in _WHERE_MIRRORED:
                inside.setdefault(path[:end], []).append(path[end:])
    return {
        root: _WHERE_MIRRORED[root[-1]]
        for root, rests in inside.items()
        if any(_is_copy(root, original, rests, shapes) for original in _places_of(rests[0], shapes))
    }


def _places_of(rest: _Path, shapes: Iterable[_Path]) -> list[_Path]:
    return [path[: -len(rest)] for path in shapes if path[-len(rest) :] == rest]


def _is_copy(root: _Path, original: _Path, rests: list[_Path], shapes: Mapping[_Path, tuple[int, ...]]) -> bool:
    if original[: len(root)] == root or any(part in _WHERE_MIRRORED for part in original):
        return False
    return all(shapes.get((*original, *rest)) == shapes[*root, *rest] for rest in rests)
