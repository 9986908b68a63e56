"""Files of Torch in a folder: which of them is the model, in one file or in shards."""

import re
from collections.abc import Iterable
from pathlib import Path

from farms_jax.weights.folders import check_numbers, read_weight_map
from farms_jax.weights.torch_file import is_torch_file
from farms_jax.weights.torch_source import TorchSource, open_torch

_NAMES = re.compile(r".*\.(pt|pth|ckpt|bin)(\.tar)?")
_MODELS = ("pytorch_model.bin", "diffusion_pytorch_model.bin")  # as Hugging Face names them
_INDEX = ".bin.index.json"
# What the trainers of Hugging Face, DeepSpeed and others put beside a model; and a part of one that says nothing alone.
_BESIDE = re.compile(
    r"(?i)(.*[_.-])?(optim(izer)?s?|(lr_)?sched(uler)?s?|scaler|rng(_states?)?|random_states?|train(ing)?_args|"
    r"trainer_states?|sampler|dl_state_dict|custom_checkpoint|zero_pp_rank)([_.-].*)?"
)
_SHARD = re.compile(r".*-\d+-of-\d+\.\w+")


def is_shard(name: str) -> bool:
    """Return whether a file is one of several that hold a model together."""
    return _SHARD.fullmatch(name) is not None


def model_files(folder: Path, filenames: Iterable[str]) -> list[str]:
    """Return those files of Torch in a folder that may be models, shards among them; optimiser states are none.

    Where one has the name that Hugging Face gives to models, it alone.
    """
    names = [name for name in filenames if _NAMES.fullmatch(name) and name[0] != "." and not _BESIDE.fullmatch(name)]
    for model in _MODELS:
        if model in names:
            return [model]
    # Of other programs, such as data sets.
    return [name for name in names if not name.endswith(".bin") or "model" in name or is_torch_file(folder / name)]


def open_torch_folder(folder: Path, filenames: Iterable[str]) -> TorchSource | None:
    """Open the model in a folder of Torch's files; `None` where there is none, or several.

    Raises:
        InputError: A shard is missing, or the files cannot be read.
    """
    filenames = list(filenames)
    files = model_files(folder, filenames)
    shards = [name for name in files if is_shard(name)]
    indices = [name for name in filenames if name.endswith(_INDEX)]
    if files and files[0] in _MODELS:
        files = files[:1]
    elif len(indices) == 1:
        files = sorted(set(read_weight_map(folder / indices[0]).values()))
    elif shards == files:
        check_numbers(folder, shards)
    elif len(files) > 1:
        return None
    return open_torch(*(folder / name for name in files)) if files else None
