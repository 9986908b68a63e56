"""Weights in every format: samples, and how the product reads them.

Everything is imported inside functions: a process that fuzzes one reader should not wait for the others' packages.
"""

import functools
import io
import logging
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.faults import mutations
from tests.faults.model_targets import encode, read_network, tensors_of
from tests.faults.target import Target, both


def small_arrays() -> dict[str, np.ndarray]:
    import ml_dtypes

    rng = np.random.default_rng(0)
    return {
        "layers/2/kernel": rng.normal(size=(6, 4)).astype(np.float32),
        "layers/10/kernel": rng.normal(size=(3, 2, 5, 4)).astype(np.float32),
        "half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "wide": np.arange(4.0).reshape(2, 2),
        "step": np.asarray(7, np.int32),
        "none": np.zeros((0, 3), np.float32),
    }


def read_weights(path: Path) -> None:
    from farms_jax.weights import open_weights

    with open_weights(path) as source:
        for name, info in source.tensors.items():
            array = source.read(name)
            assert (array.dtype, array.shape) == tuple(info), f"{name} is {array.dtype} {array.shape}, not {info}"


def _safetensors(folder: Path) -> list[Path]:
    import safetensors.numpy

    paths = [folder / f"{name}.safetensors" for name in ("a", "b", "c")]
    safetensors.numpy.save_file(small_arrays(), paths[0], {"format": "pt", "note": "free text"})
    safetensors.numpy.save_file({"model.layers.0.q.weight": np.ones((4, 4), np.float16)}, paths[1])
    safetensors.numpy.save_file({str(i): np.full((2, i + 1), i, np.uint8) for i in range(9)}, paths[2])
    return paths


def _shards(folder: Path) -> list[Path]:
    from tests.prune_helpers import write_folder

    tensors = {f"model.layers.{i}.weight": np.full((2, 3), i, np.float32) for i in range(4)}
    return [write_folder(folder / "model", tensors, shards=3)]


def _read_shards(path: Path) -> None:
    from prune.checkpoints import open_checkpoint

    both(lambda: read_weights(path), lambda: open_checkpoint(str(path)).shards())


def _gguf(folder: Path) -> list[Path]:
    from gguf import GGMLQuantizationType as Kind

    from tests.prune_helpers import byte_level_metadata, gguf_metadata, write_gguf
    from tests.weights_helpers import write

    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": 4, "hidden_size": 8, "intermediate_size": 32, "vocab_size": 40, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4}, "tie_word_embeddings": True}
    tensors = tensors_of(config, np.float32)
    merges, tokens = ["a b", "ab c"], [*map(chr, range(97, 110)), "ab", "abc"]
    metadata = gguf_metadata(config) | byte_level_metadata("llama-bpe", merges, tokens)
    kinds = {"model.layers.0.mlp.down_proj.weight": Kind.Q8_0, "model.embed_tokens.weight": Kind.F16}
    extra = {"rope_freqs.weight": np.ones(2, np.float32)}
    qwen = gguf_metadata(config, "qwen2") | byte_level_metadata("qwen2", merges, tokens)
    return [
        write_gguf(folder / "bytes.gguf", tensors, metadata, heads=(2, 1), kinds=kinds, extra=extra),
        write_gguf(folder / "pieces.gguf", tensors, gguf_metadata(config) | _pieces(), heads=(2, 1)),
        write_gguf(folder / "qwen.gguf", tensors, qwen, architecture="qwen2"),
        write("gguf", folder, {"a/b": np.ones((2, 3), np.float32), "c": np.ones(5, np.float16)}),
    ]


def _pieces() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(4)), "▁", "a", "b", "ab", "▁ab"]
    facts = {"model": "llama", "tokens": tokens, "scores": [float(-number) for number in range(len(tokens))]}
    facts |= {"token_type": [2, 3, 3, 6, 6, 6, 6, *[1] * 5], "add_bos_token": True}
    facts |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}


def _read_gguf(path: Path) -> None:
    from prune.checkpoints import open_checkpoint

    def as_checkpoint() -> None:
        if path.stem == "model":  # of an architecture that is only diagnosed, never pruned
            return
        checkpoint = open_checkpoint(str(path))
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        both(lambda: encode(checkpoint.tokenizer()), lambda: read_network(checkpoint))

    both(lambda: read_weights(path), as_checkpoint)


def _places_of(find: Callable[[Any, Any], list[tuple[int, int]]]) -> Callable[[bytes], Sequence[tuple[int, int]]]:
    """Make a function that finds where a reader reads numbers in a file's content: (first byte, size)."""

    @functools.cache
    def places(content: bytes) -> Sequence[tuple[int, int]]:
        path = mock.Mock(stat=lambda: mock.Mock(st_size=len(content)))
        return find(io.BytesIO(content), path)

    return places


def _gguf_numbers(file: Any, path: Any) -> list[tuple[int, int]]:
    from farms_jax.weights import gguf_file

    found: list[tuple[int, int]] = []
    original = gguf_file._Cursor.numbers

    def numbers(self: gguf_file._Cursor, code: str, count: int) -> Any:
        start, size = self.file.tell(), struct.calcsize(f"={code}")
        found.extend((start + i * size, size) for i in range(min(count, 40)))
        return original(self, code, count)

    with mock.patch.object(gguf_file._Cursor, "numbers", numbers):
        gguf_file._read(gguf_file._Cursor(file, path), long_arrays=True)
    return found


def _msgpack_numbers(file: Any, path: Any) -> list[tuple[int, int]]:
    import msgpack

    from farms_jax.weights import msgpack_source

    found: list[tuple[int, int]] = []
    original = msgpack_source._Reader._peek

    def peek(self: msgpack_source._Reader, position: int, count: int) -> bytes:
        # First bytes of values, headers of extensions, and the shapes and dtypes that follow them.
        found.extend([(position, 1), (position + 1, min(count, 4))])
        found.extend((position + i, 1) for i in range(2, min(count, 20)))
        return original(self, position, count)

    with mock.patch.object(msgpack_source._Reader, "_peek", peek):
        msgpack_source._Reader(msgpack.Unpacker, file, path).value()
    return [(start, size) for start, size in found if start + size <= path.stat().st_size]


def _npz(folder: Path) -> list[Path]:
    paths = [folder / "plain.npz", folder / "packed.npz"]
    arrays = {name.replace("/", "."): array for name, array in small_arrays().items()}
    np.savez(paths[0], **arrays)  # pyright: ignore[reportArgumentType]
    np.savez_compressed(paths[1], ids=np.arange(60).reshape(6, 10), w=np.zeros((40, 40), np.float32))
    return paths


def _msgpack(folder: Path) -> list[Path]:
    from flax import serialization

    from tests.weights_helpers import write

    tree = {"params": {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)}, "step": 3, "text": "t" * 40}
    tree |= {"list": [0, 300, -1, 0.5, None, True], "complex": 1 + 2j, "scalar": np.float32(2.5)}
    (path := folder / "state.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return [path, write("msgpack-chunked", folder, {"a/w": np.ones((3, 8), np.float32), "none": np.zeros((0, 2))})]


def _orbax(folder: Path) -> list[Path]:
    import orbax.checkpoint as ocp

    from tests.weights_helpers import ORBAX, write_orbax

    logging.getLogger("absl").setLevel(logging.ERROR)
    tree = {"dense": {"kernel": np.ones((6, 4), np.float32)}, "scale": np.arange(8.0), "step": np.asarray(7, np.int32)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder / "zarr3-folders", tree)
    return [folder / "zarr3-folders", *(write_orbax(form, folder / form, tree) for form in ORBAX)]


_ORBAX_FILES = {
    **dict.fromkeys(("_METADATA", ".zarray", "zarr.json"), mutations.mutate_json),
    "*": mutations.mutate_bytes,
}
TARGETS: dict[str, Target] = {
    "safetensors": Target(1000, _safetensors, {"*": mutations.mutate_safetensors}, read_weights),
    "index": Target(500, _shards, {"*.index.json": mutations.mutate_json}, _read_shards),
    "gguf": Target(750, _gguf, {"*": mutations.at_places(_places_of(_gguf_numbers))}, _read_gguf),
    "npz": Target(800, _npz, {"*": mutations.mutate_archive}, read_weights),
    "msgpack": Target(500, _msgpack, {"*": mutations.at_places(_places_of(_msgpack_numbers))}, read_weights),
    "orbax": Target(500, _orbax, _ORBAX_FILES, read_weights),
}
