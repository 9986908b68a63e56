"""Orbax checkpoints: one tree of arrays, several under names, or numbered steps of which the newest counts.

A tree is a folder: `_METADATA`, a JSON table of its leaves, and their arrays in the zarr format, in a database (OCDBT)
or in folders of their own. Arrays are read through `tensorstore`, which Orbax itself uses: Orbax restores a whole tree
(226 MiB for arrays of 192, here 158), or looks through all of it for every array (11 s for 600 arrays, here 0.8), and
ends the process on some damaged shapes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax._axes import LeafAxes, layer_of
from farms_jax._extras import from_extra
from farms_jax.errors import InputError, one_line, short_repr
from farms_jax.weights.layout import layout_of
from farms_jax.weights.reading import TensorInfo, check_name, is_valid_shape, read_json
from farms_jax.weights.source import WeightSource

_CHECKPOINT = "_CHECKPOINT_METADATA"  # marks the folder of a checkpoint
_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:.*[_.-])?(\d+)")
_TABLE = "_METADATA"
_DATABASE = "manifest.ocdbt"
_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}  # other leaves are text, or empty
_MOST_PACKED = 1 << 15  # bytes that one byte compressed with Zstandard, which Orbax uses, can stand for
_SLACK = 1 << 24  # bytes; arrays of zeros take no place in the files
_REMEDY = "save it again, or give another step"


class _Array(NamedTuple):
    """An array of a tree; `store` is its open `tensorstore.TensorStore`."""

    info: TensorInfo
    store: Any


class OrbaxSource(WeightSource):
    """Weights in an Orbax checkpoint."""

    def __init__(self, path: Path, name: str, trees: Mapping[str, Path]) -> None:
        """Open the arrays of trees, given as name -> folder; where there are several, names of arrays begin with it."""
        self._arrays: dict[str, tuple[Path, _Array]] = {}
        for tree, folder in trees.items():
            start = f"{tree}/" if len(trees) > 1 else ""
            for leaf, array in _open_tree(folder).items():
                # An NNX variable is saved with its array one level below it.
                self._arrays[f"{start}{leaf.removesuffix('/value')}"] = folder, array
        tensors = {leaf: array.info for leaf, (_, array) in self._arrays.items()}
        super().__init__(path, name, "orbax", lambda weights: layout_of(weights, {}, "flax"), tensors)

    def _read(self, name: str) -> np.ndarray:
        return self._read_from(name, self._arrays[name][1].store)

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray:
        # Chunks are read as a whole: so are the layers that lie in the same ones, which is often all.
        store = self._arrays[name][1].store
        sizes = [store.chunk_layout.read_chunk.shape[axis] for axis in axes.stack]
        first = [place - place % size for place, size in zip(index, sizes, strict=True)]
        if self._held is None or self._held[0] != (name, *first):
            self._held = None
            ends = [min(i + size, store.shape[axis]) for axis, i, size in zip(axes.stack, first, sizes, strict=True)]
            cut = dict(zip(axes.stack, map(slice, first, ends), strict=True))
            part = self._read_from(name, store[tuple(cut.get(axis, slice(None)) for axis in range(store.rank))])
            self._held = (name, *first), part
        return layer_of(self._held[1], axes, tuple(np.subtract(index, first))).copy()

    def _read_from(self, name: str, store: Any) -> np.ndarray:
        folder = self._arrays[name][0]
        try:
            return np.asarray(store.read().result())
        except Exception as error:  # of any kind: it depends on what is damaged
            raise InputError(f"{folder}: {name} cannot be read ({_reason(error)}); {_REMEDY}") from error


def open_orbax(path: Path) -> OrbaxSource | None:
    """Open a tree, a checkpoint of trees, or the newest in a folder of numbered ones; `None` for any other path."""
    if found := trees(path):
        return OrbaxSource(path, path.resolve().name, found)
    if found := steps(path):
        newest = found[-1]
        return OrbaxSource(newest, f"{path.resolve().name}, step {newest.name}", trees(newest))
    if any((path / file).is_file() for file in (_CHECKPOINT, _DATABASE)):
        raise InputError(
            f"{path}: an Orbax checkpoint without {_TABLE}: not finished, damaged, or of no arrays; give another step"
        )
    return None


def trees(folder: Path) -> dict[str, Path]:
    """Return the trees of a checkpoint, name -> folder; a folder that is itself a tree has the name ""."""
    if (folder / _TABLE).is_file():
        return {"": folder}
    found = {child.name: child for child in _folders(folder) if (child / _TABLE).is_file()}
    # Old checkpoints are not marked; these are the names that Orbax gives to a tree itself.
    return found if (folder / _CHECKPOINT).is_file() or found.keys() <= {"default", "items"} else {}


def steps(folder: Path) -> list[Path]:
    """Return a folder's checkpoints whose names end in a number, such as `300` or `step_300`, in numerical order."""
    numbered = [(int(match[1]), child) for child in _folders(folder) if (match := _STEP.fullmatch(child.name))]
    return [child for _, child in sorted(numbered) if trees(child)]


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and _UNFINISHED not in child.name]


def _open_tree(folder: Path) -> dict[str, _Array]:
    """Open the arrays of a tree, name -> array; a name is the parts of a leaf's path, joined by `/`."""
    table = read_json(folder / _TABLE, _REMEDY)
    try:
        leaves = [
            [str(part["key"]) for part in leaf["key_metadata"]]
            for leaf in table["tree_metadata"].values()
            if leaf["value_metadata"]["value_type"] in _ARRAYS
        ]
        spec = {
            "driver": "zarr3" if table.get("use_zarr3") else "zarr",
            # Where a chunk of nothing but zeros was not written, a missing one says nothing.
            "fill_missing_data_reads": not table.get("store_array_data_equal_to_fill_value", False),
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _TABLE}: not a table of Orbax ({one_line(error)}); {_REMEDY}") from error
    return _open_all(folder, spec, leaves)


def _open_all(folder: Path, spec: dict[str, Any], leaves: list[list[str]]) -> dict[str, _Array]:
    with from_extra("diagnose", f"{folder}: an Orbax checkpoint"):
        import tensorstore
    # Without a cache, every array would read the database's index anew.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 24}})
    places: dict[str, dict[str, Any]] = {}
    for parts in leaves:
        check_name(name := "/".join(parts), str(folder))
        places[name] = _place(folder.resolve(), ".".join(parts))

    def for_each(start: Callable[[str], Any], use: Callable[[Any], Any]) -> dict[str, Any]:
        """Start a task for every array, then use their results in turn."""
        name, futures, found = "", {}, {}
        try:
            for name in places:
                futures[name] = start(name)
            for name, future in futures.items():
                found[name] = use(future.result())
        except Exception as error:  # of any kind: it depends on what is damaged
            raise InputError(f"{folder}: {name} is missing or damaged ({_reason(error)}); {_REMEDY}") from error
        return found

    file = ".zarray" if spec["driver"] == "zarr" else "zarr.json"
    stores = for_each(lambda name: tensorstore.KvStore.open(places[name], context=context), lambda store: store)
    # The library's own parser ends the process where lists are nested too deep.
    for_each(lambda name: stores[name].read(file), lambda read: json.loads(read.value))
    most = _MOST_PACKED * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + _SLACK
    settings: dict[str, Any] = {"read": True, "open": True, "context": context}
    return for_each(
        lambda name: tensorstore.open({**spec, "kvstore": places[name]}, **settings),
        lambda store: _array(store, most),
    )


def _place(folder: Path, name: str) -> dict[str, Any]:
    if (folder / _DATABASE).is_file():
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder}/{name}/"}


def _array(store: Any, most: int) -> _Array:
    """Describe an array that the files can hold: the library ends the process where there is no memory for one."""
    info = TensorInfo(np.dtype(store.dtype.numpy_dtype), tuple(store.shape))
    for shape in (info.shape, store.chunk_layout.read_chunk.shape or (), store.chunk_layout.write_chunk.shape or ()):
        if not is_valid_shape(shape, info.dtype.itemsize) or math.prod(shape) * info.dtype.itemsize > most:
            raise ValueError(f"its files cannot hold an array or a chunk of shape {short_repr(tuple(shape))}")
    return _Array(info, store)


def _reason(error: Exception) -> str:
    # What follows the bracket is the specification of the array, which nobody wrote.
    return one_line(error).partition(" [")[0]
