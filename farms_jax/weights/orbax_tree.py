"""The arrays of an Orbax tree, read one by one.

A tree is a folder: `_METADATA`, a JSON table of its leaves, and their arrays in the zarr format, in a database (OCDBT)
or in folders of their own. Arrays are read through `tensorstore`, which Orbax itself uses: Orbax restores a whole tree
(226 MiB for arrays of 192, here 158), or looks through all of it for every array (11 s for 600 arrays, here 0.8), and
ends the process on some damaged shapes.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farms_jax._extras import from_extra
from farms_jax.errors import InputError
from farms_jax.weights.reading import TensorInfo, read_json
from farms_jax.weights.sanitise import check_name, is_valid_shape, one_line, short_repr

TABLE = "_METADATA"
DATABASE = "manifest.ocdbt"
_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}  # other leaves are text, or empty
_MOST_PACKED = 1 << 15  # bytes that one byte compressed with Zstandard, which Orbax uses, can stand for
_SLACK = 1 << 24  # bytes; arrays of zeros take no place in the files
_REMEDY = "save it again, or give another step"


class Array(NamedTuple):
    """An array of a tree; `store` is its open `tensorstore.TensorStore`."""

    info: TensorInfo
    store: Any


def read_tree(folder: Path) -> dict[str, Array]:
    """Open the arrays of a tree, name -> array; a name is the parts of a leaf's path, joined by `/`."""
    table = read_json(folder / TABLE, _REMEDY)
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
        raise InputError(f"{folder / TABLE}: not a table of Orbax ({one_line(error)}); {_REMEDY}") from error
    return _open_all(folder, spec, leaves)


def _open_all(folder: Path, spec: dict[str, Any], leaves: list[list[str]]) -> dict[str, Array]:
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


def _array(store: Any, most: int) -> Array:
    """Describe an array that the files can hold: the library ends the process where there is no memory for one."""
    info = TensorInfo(np.dtype(store.dtype.numpy_dtype), tuple(store.shape))
    for shape in (info.shape, store.chunk_layout.read_chunk.shape or (), store.chunk_layout.write_chunk.shape or ()):
        if not is_valid_shape(shape, info.dtype.itemsize) or math.prod(shape) * info.dtype.itemsize > most:
            raise ValueError(f"its files cannot hold an array or a chunk of shape {short_repr(tuple(shape))}")
    return Array(info, store)


def _place(folder: Path, name: str) -> dict[str, Any]:
    if (folder / DATABASE).is_file():
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder}/{name}/"}


def read_array(folder: Path, name: str, array: Array) -> np.ndarray:
    """Read an array's entries; `folder` and `name` are for the error message."""
    try:
        return np.asarray(array.store.read().result())
    except Exception as error:  # of any kind: it depends on what is damaged
        raise InputError(f"{folder}: {name} cannot be read ({_reason(error)}); {_REMEDY}") from error


def _reason(error: Exception) -> str:
    # What follows the bracket is the specification of the array, which nobody wrote.
    return one_line(error).partition(" [")[0]
