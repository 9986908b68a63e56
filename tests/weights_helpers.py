"""Weights in every format that is read, written by the formats' own packages."""

import logging
from pathlib import Path
from unittest import mock

import gguf
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import serialization, traverse_util

ORBAX = ("orbax", "orbax-zarr3", "orbax-folders", "orbax-manager")
FORMATS = ("safetensors", "gguf", "npz", "msgpack", "msgpack-chunked", *ORBAX)

logging.getLogger("absl").setLevel(logging.ERROR)


def arrays(separator="/"):
    """Arrays of several ranks, with their names in natural order."""
    rng = np.random.default_rng(0)
    shapes = {"layers 2 kernel": (6, 4), "layers 10 kernel": (3, 2, 5, 4), "norm scale": (8,)}
    return {name.replace(" ", separator): rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def mixed():
    """As `arrays`, with bfloat16, float64 and an array of no axes."""
    first = {"a/half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "a/wide": np.arange(4.0).reshape(2, 2)}
    return first | arrays() | {"step": np.asarray(7, np.int32)}


def write(form: str, folder: Path, named, *, chunk=16) -> Path:
    """Write arrays in one of FORMATS, chunked ones in pieces of this size in bytes; return what to open."""
    tree = traverse_util.unflatten_dict(named, sep="/")
    if form == "safetensors":
        safetensors.numpy.save_file(named, path := folder / "model.safetensors")
        return path
    if form == "gguf":
        return _write_gguf(folder / "model.gguf", named)
    if form == "npz":
        np.savez(path := folder / "model.npz", **named)
        return path
    if form.startswith("msgpack"):
        limit = chunk if form == "msgpack-chunked" else 2**30
        with mock.patch.object(serialization, "MAX_CHUNK_SIZE", limit):
            (path := folder / "model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        return path
    return write_orbax(form, folder / "checkpoint", tree)


def _write_gguf(path, named):
    writer = gguf.GGUFWriter(path, "any")
    for name, array in named.items():
        writer.add_tensor(name, array)
    close_gguf(writer)
    return path


def close_gguf(writer):
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_orbax(form: str, path: Path, tree) -> Path:
    """Write a tree in one of ORBAX."""
    if form == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif form == "orbax-manager":
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(path, options=options) as manager:
            for step in (9, 10):
                manager.save(step, args=ocp.args.StandardSave(tree))
    else:
        settings = {"use_zarr3": True} if form == "orbax-zarr3" else {"use_ocdbt": False}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**settings)) as checkpointer:
            checkpointer.save(path, tree)
    return path
