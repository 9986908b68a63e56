"""Run directories of the programs here, and where their checkpoints are."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from farms_jax._names import natural_key
from farms_jax.errors import InputError
from farms_jax.programs.files import CHECKSUMS, damaged_files
from farms_jax.weights import orbax_source
from farms_jax.weights.safetensors_source import WEIGHTS

SUFFIXES = (".safetensors", ".gguf", ".npz", ".msgpack")
_PLACES = ("seed*/checkpoints", "*/seed*/checkpoints", "*/checkpoints")


class Found(NamedTuple):
    """A run's model: its folder, and what to call it."""

    folder: Path
    name: str


def model_of(run: Path) -> Found | None:
    """Find the model of a run directory; a checkpoint of `train` and `sciml` is compared with its checksums.

    Args:
        run: Path of a folder.

    Returns:
        The pruned model of `prune`; of `train` and `sciml` the best checkpoint of the first seed (of the first
        setting), the last one where there is no best; `None` where the folder is no run directory.

    Raises:
        InputError: The run has no checkpoint yet, or files are not as their checksums say.
    """
    _check_files(run)
    if (run / "run.json").is_file() and (run / "model").is_dir():
        return Found(run / "model", f"{run.resolve().name}, pruned model")
    if (run / "model.part").is_dir():
        raise InputError(f"{run}: a run of prune whose model is not finished; give its command again, it goes on")
    places = [run / "checkpoints"]
    # Without its settings it may be a folder of runs, of which none is meant.
    for pattern in _PLACES if (run / "config.json").is_file() else ():
        places += sorted(run.glob(pattern), key=lambda path: natural_key(str(path)))
    for place in places:
        for folder in (place / "best", place / "last", place):
            _check_files(folder)
            if folder.is_dir() and (steps := orbax_source.steps(folder)):
                where = steps[-1].relative_to(run)
                return Found(steps[-1], f"{run.resolve().name}, {where.as_posix()}")
    if any((place / "last").is_dir() for place in places):
        raise InputError(f"{run}: a run without a checkpoint yet; wait for the end of its first epoch")
    return None


def _check_files(folder: Path) -> None:
    """Compare a checkpoint of the programs here, or the newest one in a folder, with its checksums."""
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
    """Find the checkpoints inside a run directory of any program.

    Args:
        run: Path of a folder.

    Returns:
        Paths for `open_weights`, oldest first: Orbax steps, folders of shards, files. `best` beside `last` is left out,
        since every best checkpoint has once been the last.

    Raises:
        InputError: There is no such folder.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give the directory of a run")
    found: list[tuple[int, list[tuple[int, int | str]], Path]] = []
    for path in _inside(run):
        try:
            found.append((path.stat().st_mtime_ns, natural_key(str(path)), path))
        except FileNotFoundError:  # a run keeps only some of its checkpoints
            continue
    return [path for *_, path in sorted(found)]


def _inside(folder: Path) -> Iterator[Path]:
    try:
        children = sorted(child for child in folder.iterdir() if not _is_draft(child))
        if orbax_source.trees(folder):
            yield folder
            return
    except FileNotFoundError:
        return
    names = {child.name for child in children}
    if any(name.endswith(".safetensors.index.json") for name in names) or "adapter_config.json" in names:
        yield folder
    elif WEIGHTS in names:
        yield folder / WEIGHTS
    else:
        yield from (child for child in children if child.suffix in SUFFIXES and child.is_file())
    for child in children:
        if child.is_dir() and not child.is_symlink() and not (child.name == "best" and "last" in names):
            yield from _inside(child)


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in {".part", ".tmp"} or ".orbax-checkpoint-tmp" in path.name
