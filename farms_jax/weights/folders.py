"""Which files of a folder are its model: shards, indices, variants beside them, snapshots in the hub's cache."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from farms_jax.errors import InputError, LeftOutWarning, listed, printable, short_repr
from farms_jax.weights.reading import DOWNLOAD_AGAIN, read_json
from farms_jax.weights.safetensors_source import SafetensorsSource

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model"
_USUAL = ("model", "diffusion_pytorch_model")  # what transformers and diffusers load of a folder
_FILE = re.compile(r"(?P<model>.*?)(-(?P<number>\d+)-of-(?P<count>\d+))?(?P<variant>(?<=\d)\.[^.]+)?(?P<end>\.\w+)")
_INDEX = re.compile(r"(?P<model>.*)\.safetensors\.index(?P<variant>\.[^.]+)?\.json")
CACHED = "models--"  # how the hub's cache calls the folder of a model, "models--OWNER--NAME"


def open_safetensors_folder(path: Path, filenames: Iterable[str]) -> SafetensorsSource | None:
    """Open the model among the files of a folder: one file, or the shards of an index, or shards without one.

    What transformers and diffusers would load comes first, and `NAME.safetensors` before its variants, such as
    `NAME.fp16.safetensors`.

    Returns:
        The open weights; `None` where there are none.

    Raises:
        InputError: A shard is missing, or there are several models.
    """
    index, files = safetensors_files(path, filenames)
    if index is not None:
        return _open_indexed(path / index)
    if not files:
        return None
    check_numbers(path, files)
    return SafetensorsSource(path, files)


def safetensors_files(path: Path, filenames: Iterable[str]) -> tuple[str | None, list[str]]:
    """Return the index and the files that `open_safetensors_folder` would open; of them the index alone has to exist.

    Raises:
        InputError: There are several models.
    """
    seen = [name for name in filenames if not name.startswith(".")]
    files = _by_model([name for name in seen if name.endswith(".safetensors")], _FILE)
    for usual in _USUAL:
        if files.get(usual) == [f"{usual}.safetensors"]:
            return None, files[usual]
    if indices := _main(_by_model(seen, _INDEX)):
        if len(indices) > 1:
            raise InputError(f"{path}: it has several models ({', '.join(indices)}); give a file of one of them")
        return indices[0], sorted(set(read_weight_map(path / indices[0]).values()))
    return None, _main(files)


def _by_model(filenames: Iterable[str], kind: re.Pattern[str]) -> dict[str, list[str]]:
    """Return the files of one kind by the model that they belong to.

    >>> _by_model(["unet.safetensors", "unet-1-of-2.fp16.safetensors", "unet.fp16-2-of-2.safetensors"], _FILE)
    {'unet': ['unet.safetensors'], 'unet.fp16': ['unet-1-of-2.fp16.safetensors', 'unet.fp16-2-of-2.safetensors']}
    """
    found: dict[str, list[str]] = {}
    for match in filter(None, map(kind.fullmatch, filenames)):
        found.setdefault(match["model"] + (match["variant"] or ""), []).append(match.string)
    return found


def _main(models: Mapping[str, list[str]]) -> list[str]:
    """Return the files of the usual model, or of all models but variants of others and adapters beside them."""
    for usual in _USUAL:
        if usual in models:
            return models[usual]
    names = {name for name in models if not any(name.startswith(f"{other}.") for other in models)}
    names -= {ADAPTER} if len(names) > 1 else set()
    return [file for name, files in models.items() if name in names for file in files]


def _open_indexed(path: Path) -> SafetensorsSource:
    """Open the shards that an index names; they lie beside it.

    As in transformers, tensors that it leaves out are read too; one that it names and no shard has costs a warning.

    Returns:
        The open weights.

    Raises:
        InputError: A shard is missing.
    """
    weight_map = read_weight_map(path)
    filenames = sorted(set(weight_map.values()))
    for filename in filenames:
        if not (path.parent / filename).is_file():
            raise InputError(f"{path.parent / filename}: this shard is missing, {path.name} names it; {DOWNLOAD_AGAIN}")
    source = SafetensorsSource(path.parent, filenames, weight_map)
    if missing := [printable(name) for name in weight_map if name not in source.file_of]:
        text = f"{path}: no shard has {listed(missing, 3, ', ')}, which it names; all others are read"
        warnings.warn(text, LeftOutWarning, stacklevel=2)
    return source


def read_weight_map(path: Path) -> dict[str, str]:
    """Return an index's table, tensor -> file name."""
    weight_map = read_json(path, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no weight_map; {DOWNLOAD_AGAIN}")
    for name, filename in weight_map.items():
        # A name with a folder in it would make an export write outside its own; most file systems allow 255 bytes.
        is_plain = isinstance(filename, str) and Path(filename).name == filename and filename.isprintable()
        if not is_plain or len(filename.encode()) > 255:
            raise InputError(
                f"{path}: {printable(name)} is in {short_repr(filename)}, no plain file name; {DOWNLOAD_AGAIN}"
            )
    return weight_map


def check_numbers(folder: Path, filenames: Iterable[str]) -> None:
    """Check by the numbers in their names that all shards exist, where no index tells."""
    found: dict[tuple[str, ...], set[int]] = {}
    for match in filter(None, map(_FILE.fullmatch, filenames)):
        if match["number"]:
            key = match["model"], match["count"], (match["variant"] or "") + match["end"]
            found.setdefault(key, set()).add(int(match["number"]))
    for (model, count, end), numbers in found.items():
        if missing := sorted(set(range(1, int(count) + 1)) - numbers):
            number = str(missing[0]).zfill(len(count))
            raise InputError(
                f"{folder / f'{model}-{number}-of-{count}{end}'}: this shard is missing"
                f"{f', as are {len(missing) - 1} more' if len(missing) > 1 else ''}; {DOWNLOAD_AGAIN}"
            )


def snapshot_of(path: Path) -> tuple[Path, str] | None:
    """Return the snapshot that a folder of the hub's cache stands for, and OWNER/NAME; `None` for any other folder.

    Of "models--OWNER--NAME" that is the one of the branch main, or the only one; a snapshot stands for itself.

    Raises:
        InputError: There is no snapshot, or the choice is open.
    """
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith(CACHED):
        return path, _hub_name(path.parents[1])
    if not path.name.startswith(CACHED) or not (path / "snapshots").is_dir():
        return None
    found = sorted(child.name for child in (path / "snapshots").iterdir() if child.is_dir())
    main = path / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if commit not in found and len(found) != 1:
        has = f"several snapshots ({listed(found, 5, ', ')}), and none is that of main" if found else "no snapshot"
        raise InputError(
            f"{path}: it has {has}; {'give the folder of one' if found else f'hf download {_hub_name(path)}'}"
        )
    return path / "snapshots" / (commit if commit in found else found[0]), _hub_name(path)


def _hub_name(path: Path) -> str:
    return path.name.removeprefix(CACHED).replace("--", "/")


def unfinished(path: Path) -> bool:
    """Return whether the hub's own download of a folder, or of a snapshot in its cache, has not come to its end."""
    places = (path.resolve().parent.parent / "blobs", path / ".cache" / "huggingface" / "download")
    return any(True for place in places for _ in place.glob("*.incomplete"))
