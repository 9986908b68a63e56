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
from prune.models import make_network
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


GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """Name in a GGUF file of a Hugging Face tensor."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, kind = name.rsplit(".", 1)
    if module in ends:
        return f"{ends[module]}.{kind}"
    _, _, block, module = module.split(".", 3)
    return f"blk.{block}.{GGUF_MODULES[module]}.{kind}"


def interleave_heads(array, heads):
    """Rows of a query or key projection as llama.cpp wants them: the two halves of each head in turns."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def gguf_metadata(config, architecture="llama"):
    """Keys of a GGUF file for a Hugging Face config."""
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
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
    permuted = dict(zip(("q_proj", "k_proj"), heads, strict=True)) if architecture == "llama" else {}
    for name, array in tensors.items():
        if (count := permuted.get(name.split(".")[-2])) is not None:
            array = interleave_heads(array, count)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
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
    """A float32 LLaMA with random weights, written tensor by tensor so that the writer never holds the model."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks, "head_dim": 32}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), hidden // 32)
    config = config_of("llama_tiny", **sizes, **heads, tie_word_embeddings=True)
    network = make_network(config)
    shapes = {name: shape for part in network.parts for name, shape in network.tensors(part).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    content, random = json.dumps(header).encode(), np.random.default_rng(0)
    noise = {shape: random.standard_normal(shape, np.float32) for shape in set(shapes.values())}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for number, shape in enumerate(shapes.values()):
            scale, mean = (0.1, 1.0) if len(shape) == 1 else (shape[1] ** -0.5, 0.0)
            # Rolled, so that no two blocks are the same.
            file.write(scale * np.roll(noise[shape], number) + np.float32(mean))
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


def without_times(card):
    return {key: value for key, value in card.items() if "seconds" not in key and key != "peak_memory_bytes"}


def assert_same_run(path, expected):
    """Byte for byte the same model and table, and the same card but for times."""
    assert bytes_of(path / "model") == bytes_of(expected / "model")
    assert (path / "layers.csv").read_bytes() == (expected / "layers.csv").read_bytes()
    assert without_times(card_of(path)) == without_times(card_of(expected))
    assert not (path / "model.part").exists()
