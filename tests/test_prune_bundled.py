"""The small model that ships."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from prune.checkpoints import open_checkpoint
from prune.config import BUNDLED
from prune.perplexity import perplexity

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"heldout.txt", "calibration.txt", "training.json"}


def test_the_folder_is_small_and_whole():
    assert {path.name for path in BUNDLED.iterdir()} == FILES
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 6_000_000


def test_the_weights_are_a_llama_of_eight_blocks():
    checkpoint = open_checkpoint(str(BUNDLED))
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.network().num_blocks == 8
    for name in checkpoint.tensors:
        assert np.isfinite(checkpoint.read(name).astype(np.float32)).all(), name


def test_the_tokenizer_fits_weights_and_texts():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    config = json.loads((BUNDLED / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    heldout, calibration = ((BUNDLED / name).read_text() for name in ("heldout.txt", "calibration.txt"))
    for text in (heldout, calibration):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) >= 3 * 256
        assert tokenizer.decode(ids) == text
    assert not set(heldout.splitlines()) & {line for line in calibration.splitlines() if len(line) > 40}


def test_the_model_predicts_text_that_it_has_not_seen():
    record = json.loads((BUNDLED / "training.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = np.array(tokenizer((BUNDLED / "heldout.txt").read_text())["input_ids"][: 16 * 256], np.int32)
    checkpoint = open_checkpoint(str(BUNDLED))
    loss = np.mean(perplexity(checkpoint.network(), checkpoint, ids.reshape(16, 256)).nll)
    assert loss == pytest.approx(record["loss"]["heldout"], abs=0.3)
    frequencies = np.bincount(ids, minlength=len(tokenizer))[ids] / ids.size
    assert loss < -np.log(frequencies).mean() - 1  # better by far than the best guess without context
