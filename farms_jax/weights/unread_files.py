"""What else there is to measure in a folder beside the model that is read: other models, and modules of its own."""

import json
import re
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from farms_jax.errors import LeftOutWarning, listed, printable
from farms_jax.weights.torch_folder import is_state

# What Hugging Face calls one model in several formats, adapters, and the masks of the programs here.
_SAME = re.compile(r"((pytorch|flax|tf|rust|diffusion_pytorch|adapter)_)?model|consolidated|masks")
_SHARD = re.compile(r"-\d+-of-\d+")
_MODULES = "modules.json"  # of sentence-transformers, which has the folder of each module


def warn_of_others(
    folder: Path, chosen: Iterable[str], candidates: Iterable[str], has_weights: Callable[[Path], bool]
) -> None:
    """Warn of what is not read of a folder, and say how to measure it.

    Args:
        folder: the folder.
        chosen: the files that are read.
        candidates: files of it that may be models.
        has_weights: tells whether there are weights in a folder.
    """
    chosen = sorted(chosen)
    stems = {_stem(name) for name in chosen}
    if others := [name for name in candidates if not (_is_same(_stem(name), stems) or is_state(name))]:
        read = f"{listed(chosen, 1, ' ')} {'is' if len(chosen) == 1 else 'are'} read"
        told = f"{read}, and not {listed(others, 5, ', ')} beside {'it' if len(chosen) == 1 else 'them'}"
        warnings.warn(f"{folder}: {told}; give one of these files to measure it", LeftOutWarning, stacklevel=3)
    if modules := [name for name in _modules(folder) if has_weights(folder / name)]:
        told = f"weights of this model are in {listed(map(printable, modules), 5, ', ')} too, and are not measured"
        remedy = f"give {shlex.quote(str(folder / modules[0]))} to measure them"
        warnings.warn(f"{folder}: {told}; {remedy}", LeftOutWarning, stacklevel=3)


def _stem(name: str) -> str:
    """Return what a file is called without its number among shards, and its ending.

    >>> _stem("model-00001-of-00002.safetensors"), _stem("v1.5.fp16.gguf")
    ('model', 'v1.5.fp16')
    """
    return _SHARD.sub("", name).rpartition(".")[0]


def _is_same(stem: str, chosen: Collection[str]) -> bool:
    """Tell whether a file is the chosen one or a variant of it, by its name."""
    return _SAME.fullmatch(stem.partition(".")[0]) is not None or any(
        stem == own or stem.startswith(f"{own}.") for own in chosen
    )


def _modules(folder: Path) -> list[str]:
    """Return the folders that a list of modules names; none where it is damaged, which is no matter of the weights."""
    try:
        content = json.loads((folder / _MODULES).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    paths = (
        [str(part.get("path") or "") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    )
    return [path for path in paths if path and Path(path).name == path and (folder / path).is_dir()]
