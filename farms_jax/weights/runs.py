"""Run directories of the programs here, and the checkpoints in them."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from farms_jax._names import natural_key
from farms_jax.errors import InputError
from farms_jax.programs.files import CHECKSUMS, damaged_files
from farms_jax.weights import orbax_source
from farms_jax.weights.folders import WEIGHTS, check_numbers
from farms_jax.weights.torch_folder import is_shard, model_files

SUFFIXES = (".safetensors", ".gguf", ".npz", ".msgpack")
# One setting and several seeds; several settings; `sciml`, whose phases have no seed.
_PLACES = ("seed*/checkpoints", "*/seed*/checkpoints", "*/checkpoints")


def model_of(run: Path) -> tuple[Path, str] | None:
    """Return the folder and the name of a run's model; `None` where the folder is no run directory.

    That is the pruned model of `prune`; of `train` and `sciml` the best checkpoint of the first seed (of the first
    setting), or the last one without a best. A checkpoint of `train` and `sciml` is compared with its checksums.

    Raises:
        InputError: The run has no checkpoint yet, or a file does not match its checksum.
    """
    _check_files(run)
    if (run / "run.json").is_file() and (run / "model").is_dir():
        return run / "model", f"{run.resolve().name}, pruned model"
    if (run / "model.part").is_dir():
        raise InputError(f"{run}: a run of prune whose model is not finished; give its command again, it goes on")
    places = [run / "checkpoints"]
    # Without settings of its own it may be a folder of several runs, and none of them is meant.
    for pattern in _PLACES if (run / "config.json").is_file() else ():
        places += sorted(run.glob(pattern), key=lambda path: natural_key(str(path)))
    for place in places:
        for folder in (place / "best", place / "last", place):
            _check_files(folder)
            if folder.is_dir() and (steps := orbax_source.steps(folder)):
                where = steps[-1].relative_to(run)
                return steps[-1], f"{run.resolve().name}, {where.as_posix()}"
    if any((place / "last").is_dir() for place in places):
        raise InputError(f"{run}: a run without a checkpoint yet; wait for the end of its first epoch")
    return None


def _check_files(folder: Path) -> None:
    """Compare a program's checkpoint, or the newest one in a folder, with its checksums."""
    numbered = [path for path in (folder, *folder.glob("*")) if path.name.isdecimal() and (path / CHECKSUMS).is_file()]
    if not numbered:
        return
    newest = max(numbered, key=lambda path: int(path.name))
    if damaged := damaged_files(newest, exact=True):
        others = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise InputError(
            f"{damaged[0]}: missing or damaged{others}, as {CHECKSUMS} beside it shows; put it back, or give another "
            "checkpoint"
        )


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run directory of any program, as paths for `open_weights`, oldest first.

    They are Orbax steps, folders of shards and files. `best` beside `last` is left out, since every best checkpoint has
    once been the last; so are optimiser states, a second format of a model, and shards of which some are not there yet.
    A folder that cannot be read costs a warning.

    Raises:
        InputError: There is no such folder.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give the directory of a run")
    times: dict[Path, int] = {}
    for path in _inside(run):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on removes old checkpoints
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=lambda path: (times[path], natural_key(str(path))))


def _inside(folder: Path) -> Iterator[Path]:
    try:
        children = sorted(child for child in folder.iterdir() if not _is_draft(child))
        if orbax_source.trees(folder):
            yield folder
            return
        models = _models_among(folder, children)
        folders = [child for child in children if child.is_dir() and not child.is_symlink()]
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"{folder}: cannot be read ({error.strerror or error}); what is in it is left out", stacklevel=2)
        return
    yield from models
    if models:  # DeepSpeed keeps its own state, with the weights once more, in a folder beside them
        folders = [child for child in folders if not child.name.startswith("global_step")]
    has_last = any(child.name == "last" for child in folders)
    for child in folders:
        if not (child.name == "best" and has_last):
            yield from _inside(child)


def _models_among(folder: Path, children: list[Path]) -> list[Path]:
    """Return the models that lie in a folder itself; it stands for one in shards."""
    # A link to another checkpoint of the folder, such as the last, is no further one.
    files = [child.name for child in children if child.is_file() and not (child.is_symlink() and _is_inside(child))]
    if any(name.endswith((".safetensors.index.json", ".bin.index.json")) for name in files):
        return [folder]
    # What cannot be opened says so.
    if "adapter_config.json" in files or any(name.endswith(".distcp") for name in files):
        return [folder]
    if WEIGHTS in files:
        return [folder / WEIGHTS]
    found = [name for name in files if name.endswith(SUFFIXES)]
    stems = {Path(name).stem for name in found}
    found += [name for name in model_files(folder, files) if Path(name).stem not in stems]
    shards = [name for name in found if is_shard(name)]
    if any(Path(name).stem == "last" for name in found):
        found = [name for name in found if Path(name).stem != "best"]
    whole = [folder / name for name in found if name not in shards]
    try:
        check_numbers(folder, shards)
    except InputError:  # their index comes last
        return whole
    return [folder] if shards and not whole else whole


def _is_inside(link: Path) -> bool:
    return link.resolve().parent == link.parent.resolve()


def _is_draft(path: Path) -> bool:
    """Return whether a path is being written, or was left so by a stopped process."""
    return path.name.startswith(".") or path.suffix in {".part", ".tmp"} or ".orbax-checkpoint-tmp" in path.name
