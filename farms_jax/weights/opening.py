"""Open weights by their path, whatever their format."""

import shlex
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError
from farms_jax.programs.files import expanded
from farms_jax.weights.folders import CACHED, open_safetensors_folder, snapshot_of, unfinished
from farms_jax.weights.foreign import what_is_in, what_it_is
from farms_jax.weights.gguf_source import GGUFSource
from farms_jax.weights.keras_source import KerasSource
from farms_jax.weights.lora import is_lora, no_model
from farms_jax.weights.msgpack_source import MsgpackSource
from farms_jax.weights.npz_source import NpySource, NpzSource
from farms_jax.weights.orbax_source import open_orbax
from farms_jax.weights.reading import os_errors_named
from farms_jax.weights.runs import model_of
from farms_jax.weights.safetensors_source import SafetensorsSource
from farms_jax.weights.source import WeightSource
from farms_jax.weights.torch_file import is_archive, is_torch_file
from farms_jax.weights.torch_folder import model_files, model_in
from farms_jax.weights.torch_source import open_torch
from farms_jax.weights.unread_files import warn_of_others

_READERS: dict[str, Callable[[Path], WeightSource]] = {
    ".safetensors": SafetensorsSource,
    ".gguf": GGUFSource,
    ".npz": NpzSource,
    ".msgpack": MsgpackSource,
    ".keras": KerasSource,
    ".h5": KerasSource,
}
_LAST = {".keras", ".h5"}  # beside the same model in another format, as on the hub
_KNOWN = (
    f"{', '.join(_READERS)}, .npy, a file of torch.save, a Hugging Face folder, an Orbax checkpoint, or a run directory"
)


def open_weights(path: str | Path, *, axes: Any = None, stack: Any = None) -> WeightSource:
    """Open a model's weights; headers are read and checked, arrays are not.

    Args:
        path: Hugging Face folder, also `models--OWNER--NAME` of the hub's cache, or any other with safetensors;
            `.safetensors`, `.gguf`, `.npz`, `.npy`, Flax `.msgpack`, `.keras` or `.h5` file, or one of `torch.save`;
            Orbax checkpoint, or a folder of numbered ones; run directory of one of the programs, which stands for its
            first seed's best checkpoint or its pruned model.
        axes: What the axes of the arrays count, as `farms_jax.analyze` takes it; default: as usual in the format, that
            is `farms_jax.axis_rules.torch` in safetensors, GGUF and Torch's files, outputs last in all others.
        stack: Which of them count layers, experts or seeds, likewise.

    Returns:
        The open weights, for a `with` block.

    Raises:
        InputError: There is no such path, or it is damaged, not finished, or of a kind that is not read.
    """
    path = expanded(path)
    with os_errors_named(path):
        try:
            mode = path.stat().st_mode
            source = _open_cached(path) if stat.S_ISDIR(mode) else _open_file(path, mode)
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: no such file or folder; check the path, and download a model of the hub first: "
                "hf download OWNER/NAME --local-dir FOLDER"
            ) from error
    source.declare(axes, stack)
    return source


def _open_file(path: Path, mode: int) -> WeightSource:
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: neither a file nor a folder; give {_KNOWN}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download or save it again")
    if is_lora(path):
        raise InputError(no_model(path))
    if path.suffix in _READERS:
        return _READERS[path.suffix](path)
    reader = _reader_of(path)
    if reader is None:
        with path.open("rb") as file:
            known = what_it_is(path, file.read(8))
        if known:
            raise InputError(f"{path}: {known[0]}, which is not read; {known[1]}")
        raise InputError(f"{path}: not a kind of weights that can be read; give {_KNOWN}")
    return reader(path)


def _reader_of(path: Path) -> Callable[[Path], WeightSource] | None:
    """Return the reader of a file by what it starts with, whatever it is called."""
    if is_torch_file(path):
        return open_torch
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"\x89HDF"):
        return KerasSource
    if start.startswith(b"\x93NUMPY"):
        return NpySource
    if start.startswith(b"GGUF"):
        return GGUFSource
    if start.startswith(b"PK\3\4"):
        if not is_archive(path):
            raise InputError(f"{path}: ends too early: not finished, or damaged; download or save it again")
        return NpzSource
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return SafetensorsSource
    if start[0] == 0x80 and start[1:2] in b"\2\3\4\5":
        raise InputError(
            f"{path}: a pickle, which can run any code and is never loaded; load it where you trust it, and save its "
            "arrays with numpy.savez, or with torch.save if they are Torch's"
        )
    # Checkpoints of flax.training have no suffix; a map is what a msgpack file starts with.
    if not path.suffix and (0x80 < start[0] < 0x90 or start[0] in {0xDE, 0xDF}):
        return MsgpackSource
    return None


def _open_cached(path: Path) -> WeightSource:
    """Open a folder, which may be one of the hub's cache, or one that the hub's client is still writing."""
    snapshot = snapshot_of(path)
    folder = path if snapshot is None else snapshot[0]
    try:
        source = _open_folder(folder)
    except (InputError, FileNotFoundError) as error:
        if not unfinished(folder):
            raise
        raise InputError(f"{error}; its download has not come to its end: give the same hf download again") from error
    if snapshot is not None:
        source.name = snapshot[1]
    return source


def _open_folder(path: Path) -> WeightSource:
    filenames = sorted(child.name for child in path.iterdir())
    if model := model_of(path):
        folder, name = model
        source = _open_folder(folder)
        source.name = name
        return source
    if source := open_orbax(path):
        return source
    if is_lora(path):
        raise InputError(no_model(path))
    if source := open_safetensors_folder(path, filenames):
        _warn_of_others(path, filenames, source.layouts)
        return source
    files = [name for name in filenames if Path(name).suffix in _READERS and not name.startswith(".")]
    torch_files = model_in(path, filenames)
    # Where the same model is there in another format, Torch is not needed; safetensors were opened above.
    files = [name for name in files if Path(name).suffix not in _LAST] or ([] if torch_files else files)
    model = files if files else torch_files
    if len(model) == 1 or (model and not files):
        _warn_of_others(path, filenames, model)
        return open_weights(path / model[0]) if len(model) == 1 else open_torch(*(path / name for name in model))
    raise InputError(_nothing_in(path, filenames, files))


def _warn_of_others(folder: Path, filenames: list[str], chosen: Iterable[str]) -> None:
    files = [name for name in filenames if Path(name).suffix in _READERS and not name.startswith(".")]
    warn_of_others(folder, chosen, [*files, *model_files(folder, filenames)], _has_weights)


def _nothing_in(path: Path, filenames: list[str], files: list[str]) -> str:
    if not filenames:
        return f"{path}: the folder is empty; give {_KNOWN}"
    if several := files or model_files(path, filenames):
        return f"{path}: it has several models ({', '.join(several[:5])}); give one of the files"
    if any(name.endswith(".distcp") for name in filenames):
        return (
            f"{path}: a distributed checkpoint of Torch; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(path))} weights.pt"
        )
    if known := what_is_in(path, filenames):
        return f"{path}: {known[0]}, which is not read; {known[1]}"
    inside = [
        name for name in filenames if (path / name).is_dir() and (name.startswith(CACHED) or _has_weights(path / name))
    ]
    if inside:
        folders = ", ".join(inside[:5])
        return f"{path}: no weights in it, but in its folders {folders}; give one of them, as {path / inside[0]}"
    return f"{path}: there are no weights in it ({', '.join(filenames[:5])}); give {_KNOWN}"


def _has_weights(folder: Path) -> bool:
    names = [child.name for child in folder.iterdir()]
    return any(Path(name).suffix in _READERS for name in names) or bool(model_files(folder, names))
