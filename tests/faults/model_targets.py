"""What belongs to a model beside its weights: config, tokenizer, adapter, texts.

Everything is imported inside functions: a process that fuzzes one reader should not wait for the others' packages.
"""

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import mutations
from tests.faults.target import TEXT, Target, both, new_folder


def _configs(folder: Path) -> list[Path]:
    import safetensors.numpy

    from tests.prune_helpers import FOLDERS, QWEN, config_of

    eights = ("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim")
    sizes: dict[str, Any] = dict.fromkeys(eights, 8) | {"num_hidden_layers": 1, "vocab_size": 16, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    given = {name: config_of(name, **sizes) for name in FOLDERS}
    given |= {f"{name}_old": config_of(name, "config.legacy.json", **sizes) for name in FOLDERS if "llama" in name}
    given |= {f"qwen{number}": QWEN | sizes | {"model_type": f"qwen{number}"} for number in (2, 3)}
    families = ("mistral", "phi3", "gemma2", "gemma3_text", "smollm3", "olmo2", "gpt_neox", "falcon")
    given |= {name: QWEN | sizes | {"model_type": name, "rotary_pct": 0.5} for name in families}
    for name, config in given.items():
        root = new_folder(folder, name)
        safetensors.numpy.save_file(tensors_of(config, np.float16), root / "model.safetensors")
        (root / "config.json").write_text(json.dumps(config))
    return [folder / name for name in given]


def tensors_of(config: dict[str, Any], dtype: type) -> dict[str, np.ndarray]:
    """All tensors of a network, filled with ones."""
    from prune.models import make_network

    network = make_network(config)
    return {name: np.ones(shape, dtype) for part in network.parts for name, shape in network.tensors(part).items()}


def _read_config(path: Path) -> None:
    from prune.checkpoints import FolderCheckpoint

    FolderCheckpoint(path).network()


def _tokenizers(folder: Path) -> list[Path]:
    import sentencepiece
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from tests.prune_helpers import byte_tokenizer

    byte_tokenizer(begin=True).save_pretrained(folder / "bytes")
    vocab = {token: number for number, token in enumerate(["<unk>", "[CLS]", "it", "##s", "a", "b", "##c", "12", "ab"])}
    words = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", cls_token="[CLS]").save_pretrained(
        folder / "words"
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("it", -2.5), ("▁it", -3.0)], 0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>").save_pretrained(folder / "unigram")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=(f"it is a small text of words {number}" for number in range(100)),
        model_writer=model,
        vocab_size=50,
        model_type="bpe",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    pieces, gpt2 = new_folder(folder, "pieces"), new_folder(folder, "gpt2")
    (pieces / "tokenizer.model").write_bytes(model.getvalue())
    (pieces / "config.json").write_text('{"model_type": "llama"}')
    (pieces / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (gpt2 / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (gpt2 / "merges.txt").write_text("#version: 0.2\na b\n")
    (gpt2 / "added_tokens.json").write_text('{"<extra>": 4, "<more>": 5}')
    (gpt2 / "special_tokens_map.json").write_text('{"pad_token": "<extra>", "additional_special_tokens": ["<more>"]}')
    (gpt2 / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"}')
    return [folder / name for name in ("bytes", "bytes", "words", "unigram", "pieces", "gpt2")]


def _read_tokenizer(path: Path) -> None:
    from prune.checkpoints import open_tokenizer

    encode(open_tokenizer(str(path)))


def read_network(checkpoint: Any) -> None:
    """Do as `checkpoint.network()`, but without the shapes of its tensors, which JAX needs 50 ms for."""
    from prune.models import make_network

    network = make_network(checkpoint.config, checkpoint.tensors)
    network.layer_name(0, network.linears[0])


def encode(tokenizer: Any) -> None:
    from prune.texts import samples

    samples.tokenizer_fingerprint(tokenizer)
    samples._encoder(tokenizer, True, "text")(TEXT)


def _lora(folder: Path) -> list[Path]:
    import safetensors.numpy

    root = new_folder(folder, "lora")
    base = {"model.layers.0.q.weight": (12, 8), "model.embed.weight": (20, 8), "model.conv.weight": (6, 4, 3, 3)}
    safetensors.numpy.save_file({k: np.ones(s, np.float16) for k, s in base.items()}, root / "base.safetensors")
    adapter, prefix = {}, "base_model.model.model"
    for name, a, b in (("layers.0.q", (2, 8), (12, 2)), ("conv", (2, 4, 3, 3), (6, 2, 1, 1))):
        adapter[f"{prefix}.{name}.lora_A.weight"] = np.ones(a, np.float32)
        adapter[f"{prefix}.{name}.lora_B.weight"] = np.ones(b, np.float32)
    adapter |= {
        f"{prefix}.embed.lora_embedding_A": np.ones((2, 20)),
        f"{prefix}.embed.lora_embedding_B": np.ones((8, 2)),
    }
    adapter[f"{prefix}.layers.0.q.lora_magnitude_vector"] = np.ones(12, np.float32)
    safetensors.numpy.save_file(adapter, root / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "alpha_pattern": {r"layers\.0\.q": 5}, "use_rslora": False}
    config |= {"fan_in_fan_out": False, "use_dora": False, "base_model_name_or_path": "somebody/model"}
    config |= {"init_lora_weights": True, "target_parameters": ["up.w"], "trainable_token_indices": {"up": [1, 2]}}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return [root]


def _read_lora(path: Path) -> None:
    from farms_jax.weights import LoraSource, open_weights

    with LoraSource(open_weights(path / "base.safetensors"), path) as source:
        for name, info in source.tensors.items():
            assert source.read(name).shape == info.shape


def _tokens(folder: Path) -> list[Path]:
    ids = np.random.default_rng(0).integers(0, 256, (6, 20))
    np.save(folder / "rows.npy", ids.astype(np.uint16))
    np.save(folder / "flat.npy", ids.reshape(-1))
    np.savez(folder / "ids.npz", ids=ids)
    return [folder / "rows.npy", folder / "flat.npy", folder / "ids.npz"]


def _lines(folder: Path) -> list[Path]:
    texts = [f"document {number}: {TEXT}" for number in range(4)]
    (path := folder / "texts.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    (plain := folder / "text.txt").write_text(TEXT * 3)
    (array := folder / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    (table := folder / "texts.csv").write_text("n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    return [path, path, path, plain, array, table]


def _parquet(folder: Path) -> list[Path]:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": [f"document {n} {TEXT}" for n in range(8)] + [None], "n": range(9)})
    parquet.write_table(table, folder / "snappy.parquet")
    parquet.write_table(table, folder / "plain.parquet", compression="none", use_dictionary=False)
    parquet.write_table(table, folder / "zstd.parquet", compression="zstd", row_group_size=3)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    return [folder / "snappy.parquet", folder / "plain.parquet", folder / "zstd.parquet", folder / "stream.arrow"]


def _read_text(path: Path) -> None:
    from prune.texts import calibration_samples, evaluation_blocks

    tokenizer = _tokenizer()
    both(
        lambda: calibration_samples(str(path), tokenizer, count=2, seed=0, length=20, vocab_size=256),
        lambda: evaluation_blocks(str(path), tokenizer, limit=3, length=20, vocab_size=256),
    )


@functools.cache
def _tokenizer() -> Any:
    from tests.prune_helpers import byte_tokenizer

    return byte_tokenizer()


_TOKENIZER_FILES = {
    "*.json": mutations.mutate_json,
    "tokenizer.model": mutations.mutate_bytes,
    "merges.txt": mutations.mutate_bytes,
}
_ADAPTER_FILES = {"*.json": mutations.mutate_json, "adapter_*": mutations.mutate_safetensors}
_LINES_FILES = {
    "*.jsonl": mutations.mutate_json_lines,
    "*.json": mutations.mutate_json,
    "*.txt": mutations.mutate_bytes,
    "*.csv": mutations.mutate_bytes,
}
TARGETS: dict[str, Target] = {
    "config": Target(750, _configs, {"config.json": mutations.mutate_json}, _read_config),
    "tokenizer": Target(750, _tokenizers, _TOKENIZER_FILES, _read_tokenizer),
    "lora": Target(500, _lora, _ADAPTER_FILES, _read_lora),
    "tokens": Target(400, _tokens, {"*.npy": mutations.mutate_npy, "*.npz": mutations.mutate_archive}, _read_text),
    "jsonl": Target(400, _lines, _LINES_FILES, _read_text),
    "parquet": Target(500, _parquet, {"*": mutations.mutate_bytes}, _read_text),
}
