"""Files of Torch in a folder: which of them is the model, in one file or in shards."""

import re
from collections.abc import Iterable
from pathlib import Path

from farms_jax.errors import InputError
from farms_jax.weights.folders import check_numbers, read_weight_map
from farms_jax.weights.reading import DOWNLOAD_AGAIN
from farms_jax.weights.torch_file import is_torch_file

_NAMES = re.compile(r".*\.(pt|pth|ckpt|bin)(\.tar)?")
_MODELS = ("pytorch_model.bin", "diffusion_pytorch_model.bin")  # as Hugging Face names them
_INDEX = ".bin.index.json"
# What the trainers of Hugging Face, DeepSpeed and others put beside a model; and a part of one that says nothing alone.
_BESIDE = re.compile(
    r"(?i)(.*[_.-])?(optim(izer)?s?|(lr_)?sched(uler)?s?|scaler|rng(_states?)?|random_states?|train(ing)?_args|"
    r"trainer_states?|sampler|dl_state_dict|custom_checkpoint|zero_pp_rank)([_.-].*)?"
)
_SHARD = re.compile(r".*-\d+-of-\d+\.\w+")


def is_state(name: str) -> bool:
    """Return whether a file is what trainers put beside a model: states of optimiser, schedule, random numbers."""
    return _BESIDE.fullmatch(name) is not None


def is_shard(name: str) -> bool:
    """Return whether a file is one of several that hold a model together."""
    return _SHARD.fullmatch(name) is not None


def model_files(folder: Path, filenames: Iterable[str]) -> list[str]:
    """Return those files of Torch in a folder that may be models, shards among them; optimiser states are none.

    Where one has the name that Hugging Face gives to models, it alone.
    """
    names = [name for name in filenames if _NAMES.fullmatch(name) and name[0] != "." and not is_state(name)]
    for model in _MODELS:
        if model in names:
            return [model]
    # Of other programs, such as data sets.
    return [name for name in names if not name.endswith(".bin") or "model" in name or is_torch_file(folder / name)]


def model_in(folder: Path, filenames: Iterable[str]) -> list[str]:
    """Return the files of the model among Torch's in a folder, several where they are shards; none where it is open.

    Raises:
        InputError: A shard is missing.
    """
    filenames = list(filenames)
    files = model_files(folder, filenames)
    if len(files) == 1 and not is_shard(files[0]):
        return files
    indices = [name for name in filenames if name.endswith(_INDEX)]
    if len(indices) == 1:
        named = sorted(set(read_weight_map(folder / indices[0]).values()))
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise InputError(f"{folder / missing[0]}: this shard is missing, {indices[0]} names it; {DOWNLOAD_AGAIN}")
        return named
    if not all(map(is_shard, files)):
        return []
    check_numbers(folder, files)
    return files
