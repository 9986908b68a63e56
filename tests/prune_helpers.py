"""What the tests of `prune/` share."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prune.config import Config
from prune.forward import apply_block, apply_embed
from prune.models import make_network
from prune.output import MASKS
from tests.weights_helpers import close_gguf

DATA = Path(__file__).parent / "data"
FOLDERS = ("llama_tiny", "llama_tiny_rope3", "llama_tiny_tied", "llama_tiny_bias", "opt_tiny", "opt_tiny_postnorm")
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 30,
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 2,
}


def byte_tokenizer(*, begin: bool = False) -> Any:
    """A token per byte, 256 in all; with `begin`, texts get a first BOS unless they are asked not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = alphabet[-1], alphabet[-2]
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 255)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def folder_with_tokenizer(name: str, folder: Path) -> Path:
    """A copy of a fixture's model, with the tokenizer of bytes in it."""
    copy = shutil.copytree(DATA / name, folder / name)
    byte_tokenizer().save_pretrained(copy)
    return copy


def weights_of(name):
    """Tensors of a fixture folder, read by the format's own package."""
    return safetensors.numpy.load_file(DATA / name / "model.safetensors")


def state_of(network, part, tensors):
    """State of a part, from all tensors of the model."""
    return network.to_state(part, {name: tensors[name] for name in network.tensors(part)})


def logits_of(network, tensors, ids):
    """Logits (B, T, V) of the whole network, block by block."""
    x = apply_embed(network, state_of(network, "embed", tensors), ids)
    for block in range(network.num_blocks):
        x = apply_block(network, state_of(network, block, tensors), x)
    return np.asarray(network.head(state_of(network, "head", tensors), x))


def write_folder(folder, tensors, *, config="llama_tiny", shards=1):
    """A Hugging Face folder, written by the format's own package; sharded with an index where asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DATA / config / "config.json", folder / "config.json")
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        filename = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        safetensors.numpy.save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, filename)
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def written_back(checkpoint):
    """Bytes of each weight file of an export: headers from shards(), values from read()."""
    files = {}
    for filename, layout in checkpoint.shards().items():
        content = bytearray(layout.size)
        content[: len(layout.header)] = layout.header
        for name, entry in layout.tensors.items():
            content[entry.start : entry.stop] = checkpoint.read(name).tobytes()
        files[filename] = bytes(content)
    return files


def interleave_heads(array, heads):
    """Rows of a query or key projection as llama.cpp wants them: the two halves of each head in turns."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def gguf_metadata(config, architecture="llama"):
    """Keys of a GGUF file for a Hugging Face config."""
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        **dict.fromkeys(HEAD_SIZES, config["head_dim"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def write_gguf(path, tensors, metadata, *, architecture="llama", heads=(4, 2), kinds=None, extra=None):
    """A GGUF file with Hugging Face tensors, as llama.cpp's converter lays it out, by the `gguf` package.

    `kinds`: Hugging Face name -> quantisation, float32 where not named; `extra`: more tensors under GGUF names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    # Its names are those of every architecture here.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)
    permuted = dict(zip(("q_proj", "k_proj"), heads, strict=True)) if architecture == "llama" else {}
    for name, array in tensors.items():
        if (count := permuted.get(name.split(".")[-2])) is not None:
            array = interleave_heads(array, count)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    close_gguf(writer)
    return path


TEXT = "It's 12345 o'clock, WE'LL pay $9.99 for 4½ x  3 \t naïve «Grüße» 你好 🙂!\r\n\n  Then (they) left...   "


def byte_level_metadata(rule, merges=None, tokens=None, **more):
    """Metadata of a byte-level tokenizer; without merges every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*(tokens or alphabet), "<|end|>", "<|begin|>", "  <think>"]
    count = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (count - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges or [],
        "tokenizer.ggml.eos_token_id": count - 3,
        "tokenizer.ggml.bos_token_id": count - 2,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def trained_tokenizer(pre_tokenizer):
    """A byte-level BPE tokenizer trained on our own documentation, and the same as metadata."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    theirs.train_from_iterator([(DATA / "README.md").read_text(), TEXT * 3], trainer)
    content = json.loads(theirs.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    return theirs, [" ".join(merge) for merge in content["merges"]], tokens


def config_of(name, form="config.json", **changes):
    """Config of a fixture; a change to ... removes the field."""
    config = json.loads((DATA / name / form).read_text()) | changes
    return {key: value for key, value in config.items() if value is not ...}


def numbers_of(name):
    """Arrays and JSON of a fixture model: `ids`, `logits` ..., and its entry under `models`."""
    fixture = name[: name.index("_tiny") + 5]
    with np.load(DATA / f"{fixture}.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}
    return arrays, json.loads((DATA / f"{fixture}.json").read_text())["models"][name]


def small_run(folder, model="llama_tiny", **changes):
    """Settings of a run on a fixture's model or a folder; token ids stand for the texts, so no tokenizer is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(DATA / "llama_tiny.npz") as file:
        np.save(folder / "calibration.npy", file["calib_ids"])
        np.save(folder / "text.npy", file["llama_tiny/ids"])
    settings = {
        "model": str(DATA / model if isinstance(model, str) else model),
        "calibration": str(folder / "calibration.npy"),
        "text": str(folder / "text.npy"),
        "samples": 8,
        "length": 40,
        "rows": 48,
        "per_axis": 2,
        "out": folder / "out",
    }
    return Config(**settings | changes)


def bytes_of(folder):
    """Content of every file of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_random_llama(folder, *, blocks, hidden, intermediate):
    """A float32 LLaMA with random weights, in a file for each part."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks, "head_dim": 32}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), hidden // 32)
    config = config_of("llama_tiny", **sizes, **heads, tie_word_embeddings=True)
    network, random, weight_map = make_network(config), np.random.default_rng(0), {}
    folder.mkdir()
    for part in network.parts:
        shapes = {name: shape for name, shape in network.tensors(part).items() if name not in weight_map}
        tensors = {
            name: random.standard_normal(shape, np.float32) * shape[-1] ** -0.5 for name, shape in shapes.items()
        }
        safetensors.numpy.save_file(tensors, folder / f"{part}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def command(config, **changes):
    """The command line of a run."""
    options = dataclasses.asdict(dataclasses.replace(config, **changes))
    flags = []
    for name, value in options.items():
        if value is not None and value != getattr(Config(), name):
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [sys.executable, "-m", "prune.llama", *flags]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def card_of(path):
    """The card of a run."""
    return json.loads((path / "run.json").read_text())


def assert_same_run(path, expected):
    """Byte for byte the same model and table, and the same card but for times and memory."""
    assert bytes_of(path / "model") == bytes_of(expected / "model")
    assert (path / MASKS).read_bytes() == (expected / MASKS).read_bytes()
    assert (path / "layers.csv").read_bytes() == (expected / "layers.csv").read_bytes()
    cards = [card_of(run) for run in (path, expected)]
    for card in cards:
        for key in [key for key in card if "seconds" in key or key in {"peak_memory_bytes", "date"}]:
            del card[key]
    assert cards[0] == cards[1]
    assert not (path / "model.part").exists()
