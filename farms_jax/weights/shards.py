"""Folders of safetensors: one file, or shards with an index, as Hugging Face lays them out."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from farms_jax.errors import InputError
from farms_jax.weights.safetensors_file import Header, read_header
from farms_jax.weights.sanitise import one_line, printable, short_repr

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Shards(NamedTuple):
    """Checked files of one model.

    Attributes:
        headers: file name -> header.
        home: tensor -> name of the file that holds it.
    """

    headers: dict[str, Header]
    home: dict[str, str]


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        remedy: what to do where the file is not there.

    Returns:
        Its content.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return content


def read_files(folder: Path, filenames: Iterable[str]) -> Shards:
    """Read the headers of files that make up a model.

    Args:
        folder: of the files.
        filenames: inside it.

    Returns:
        The files.

    Raises:
        InputError: a file is damaged, or a tensor is in two.
    """
    headers = {filename: read_header(folder / filename) for filename in filenames}
    home: dict[str, str] = {}
    for filename, header in headers.items():
        for name in header.tensors:
            if name in home:
                raise InputError(f"{folder}: {name} is in two shards, {home[name]} and {filename}; download them again")
            home[name] = filename
    return Shards(headers, home)


def read_indexed(path: Path) -> Shards:
    """Read the headers of the shards that an index names.

    Args:
        path: of the index; the shards are beside it.

    Returns:
        The files, in the order of their names.

    Raises:
        InputError: a file is missing or damaged, or index and shards disagree.
    """
    index = _read_index(path)
    filenames = sorted(set(index.values()))
    for filename in filenames:
        if not (path.parent / filename).is_file():
            raise InputError(
                f"{path.parent / filename}: this shard is missing, {path.name} names it; download it again"
            )
    shards = read_files(path.parent, filenames)
    _check_index(path, index, shards.home)
    return shards


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no weight_map; download it again")
    for name, filename in weight_map.items():
        # A name with a folder in it would make an export write outside its own.
        if not isinstance(filename, str) or Path(filename).name != filename or not _can_be_file(filename):
            raise InputError(
                f"{path}: {printable(name)} is in {short_repr(filename)}, no plain file name; download it again"
            )
    return weight_map


def _can_be_file(name: str) -> bool:
    return name.isprintable() and len(name.encode()) <= 255  # of most file systems


def _check_index(path: Path, index: Mapping[str, str], home: Mapping[str, str]) -> None:
    missing = [
        f"{printable(name)} (not in {printable(filename)})"
        for name, filename in index.items()
        if home.get(name) != filename
    ]
    unlisted = [
        f"{printable(name)} (in {printable(filename)}, not in the index)"
        for name, filename in home.items()
        if name not in index
    ]
    if faults := missing + unlisted:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(f"{path}: it disagrees with its shards: {', '.join(faults[:10])}{more}; download all")
