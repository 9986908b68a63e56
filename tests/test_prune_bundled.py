"""The small model that ships, and the program that trains it."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from farms_jax.errors import InputError
from prune.checkpoints import open_checkpoint
from prune.models import make_network
from prune.small.model import blocks_of, evaluation_loss, from_tensors, initial_params, llama_config, to_tensors
from prune.small.text import END, clean, encode, read_corpus, train_tokenizer
from prune.train_small import CHECKPOINT, Config, draw, train

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "prune" / "bundled"
WRITTEN = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "heldout.txt",
    "calibration.txt",
    "training.json",
}


def story(articles, seed=0, titles=True):
    """Text of few words in a fixed order of kinds: much to learn in few steps."""
    rng = np.random.default_rng(seed)
    kinds = [["the", "a"], ["small", "old", "red"], ["cat", "fox", "hen"], ["sees", "eats"], ["it", "them"], [".", "."]]
    lines = []
    for number in range(articles):
        lines += [f" = Tale {number} = " if titles else "", " "]
        lines += [" ".join(words[rng.integers(len(words))] for words in kinds) for _ in range(12)]
    return "\n".join(lines) + "\n"


def settings(folder):
    """Texts, and settings of a training that takes seconds."""
    (folder / "first.txt").write_text(story(30))
    (folder / "last.txt").write_text(story(40, seed=1))
    return Config(
        text=(folder / "first.txt", folder / "last.txt"),
        out=folder / "model",
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        blocks=2,
        heads=2,
        kv_heads=1,
        length=16,
        steps=40,
        learning_rate=1e-2,
        warmup=5,
        heldout_bytes=700,
        validation_bytes=700,
        calibration_bytes=1500,
        evaluate_every=10,
    )


@pytest.fixture
def small(tmp_path):
    return settings(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings, and the record of a training under them; its folder is only read."""
    config = settings(tmp_path_factory.mktemp("trained"))
    return config, train(config)


def evaluated(folder, tokenizer_ids, length):
    """Mean loss of a folder's weights, read by the checkpoint reader."""
    checkpoint = open_checkpoint(str(folder))
    network = make_network(checkpoint.config)
    tensors = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.tensors}
    return float(evaluation_loss(network, from_tensors(network, tensors), blocks_of(tokenizer_ids, length)))


def test_training_writes_a_model_that_has_learnt(trained):
    small, record = trained
    assert {path.name for path in small.out.iterdir()} == WRITTEN
    assert json.loads((small.out / "training.json").read_text()) == json.loads(json.dumps(record))
    checkpoint = open_checkpoint(str(small.out))
    make_network(checkpoint.config).check({name: info.shape for name, info in checkpoint.tensors.items()})
    assert {str(info.dtype) for info in checkpoint.tensors.values()} == {"float16"}
    losses = [line["validation"] for line in record["history"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert record["history"][record["kept_step"] // 10 - 1]["validation"] == min(losses)
    assert abs(record["loss"]["validation"] - min(losses)) < 1e-2  # float16 apart
    assert record["loss"]["heldout"] < math.log(checkpoint.config["vocab_size"]) - 1
    assert record["tokens_seen"] == 40 * 4 * 16


def test_losses_in_the_record_are_those_of_the_folder(trained):
    small, record = trained
    tokenizer = AutoTokenizer.from_pretrained(small.out)
    text = (small.out / "heldout.txt").read_text()
    pieces = text.replace("= Tale", f"{END}= Tale")
    ids = np.array(tokenizer(pieces, add_special_tokens=False)["input_ids"], np.int32)
    assert evaluated(small.out, ids, small.length) == pytest.approx(record["loss"]["heldout"], rel=1e-5)


def test_a_stopped_training_goes_on_to_the_same_weights(trained, tmp_path):
    small, _ = trained
    other = dataclasses.replace(small, out=tmp_path / "resumed")
    for until in (3, 17):  # before the first checkpoint, and after one
        assert train(other, until=until) is None
        assert {path.name for path in other.out.glob("*")} == ({CHECKPOINT} if until > 10 else set())
    train(other)
    for name in WRITTEN - {"training.json"}:
        assert (other.out / name).read_bytes() == (small.out / name).read_bytes(), name
    kept = [json.loads((folder / "training.json").read_text())["kept_step"] for folder in (small.out, other.out)]
    assert kept[0] == kept[1]


def test_the_seed_decides_the_first_weights(small):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "blocks", "heads", "kv_heads", "length")
    network = make_network(llama_config(**{name: getattr(small, name) for name in sizes}))
    first, again, other = (initial_params(network, seed)["ends"]["model.embed_tokens.weight"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_a_checkpoint_of_other_settings_or_damaged_is_refused(small):
    train(small, until=10)
    path = small.out / CHECKPOINT
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"unfinished\.npz is of a training with other settings"):
        train(dataclasses.replace(small, learning_rate=2e-2))
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    with pytest.raises(InputError, match="is damaged"):
        train(small)


def test_a_training_that_diverges_says_so_and_writes_no_model(small):
    with pytest.raises(InputError, match="lower --learning-rate"):
        train(dataclasses.replace(small, learning_rate=1e30))
    assert not (small.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": (Path("nowhere.txt"),)}, "there is no file nowhere.txt"),
        ({"heldout_bytes": 10**6}, "too short for 1000000 bytes"),
        ({"length": 2000}, "--length"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"vocab_size": 256}, "--vocab-size must be at least 257"),
        ({"heads": 3}, "num_attention_heads"),
    ],
)
def test_wrong_input_is_one_error_before_anything_is_written(small, change, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(small, **change))
    assert not small.out.exists()


def test_a_text_that_is_not_utf8_is_refused(small):
    small.text[0].write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"first\.txt is not UTF-8"):
        train(small)


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "prune.train_small", "--text", "nowhere.txt", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "prune.train_small: --text: there is no file nowhere.txt"


@pytest.mark.parametrize("titles", [True, False])
def test_texts_are_cut_from_the_end_at_articles_or_lines(tmp_path, titles):
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        path.write_text(story(20, seed=number, titles=titles))
    corpus = read_corpus(paths, 500, 300, 1000)
    whole = "".join(clean(path.read_text()) for path in paths)
    assert corpus.training + corpus.validation + corpus.heldout == whole
    assert corpus.training.endswith(corpus.calibration)
    for text, size in ((corpus.heldout, 500), (corpus.validation, 300), (corpus.calibration, 1000)):
        first, _, rest = text.partition("\n")
        assert first.startswith("= Tale") == titles
        assert len(text) >= size
        start = rest.find("= Tale") if titles else 0
        assert len(rest[start:]) < size  # a piece less would be too short


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n = A = \n \n one , two ; three ! \n", "= A =\none, two; three!\n"),
        ("3 @,@ 000 km at 2 @.@ 5 % of the well @-@ known one", "3,000 km at 2.5% of the well-known one\n"),
        ('the " old " and the " new "', 'the "old" and the "new"\n'),
        ("it 's theirs , she did n't ( not once ) [ ever ]", "it's theirs, she didn't (not once) [ever]\n"),
        ("Plain text, as people (all) write it.\n", "Plain text, as people (all) write it.\n"),
    ],
)
def test_wikitext_is_joined_again(text, expected):
    assert clean(text) == expected


def test_every_text_has_tokens_and_comes_back():
    tokenizer = train_tokenizer(story(5), 300)
    text = "Ünïcode, 漢字 and\ttabs 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(END) == 0


def test_articles_begin_with_the_end_token():
    tokenizer = train_tokenizer(story(5), 300)
    text = clean(story(3))
    ids = encode(tokenizer, text)
    assert (ids == 0).sum() == 3
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == text


def test_draws_depend_on_the_step_alone(small):
    ids = np.arange(500, dtype=np.int32)
    first, again, later = draw(ids, small, 7), draw(ids, small, 7), draw(ids, small, 8)
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()
    assert first.shape == (4, 17)
    np.testing.assert_array_equal(np.diff(first), 1)


def test_training_differentiates_the_network_that_is_pruned(trained):
    small, _ = trained
    checkpoint = open_checkpoint(str(small.out))
    network = make_network(checkpoint.config)
    tensors = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.tensors}
    params = from_tensors(network, tensors)
    for name, array in to_tensors(network, params).items():
        np.testing.assert_array_equal(array, tensors[name])
    ids = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    x = network.embed(network.to_state("embed", {name: tensors[name] for name in network.tensors("embed")}), ids)
    for block in range(network.num_blocks):
        x = network.block(network.to_state(block, {name: tensors[name] for name in network.tensors(block)}), x)
    head = network.to_state("head", {name: tensors[name] for name in network.tensors("head")})
    logs = jax.nn.log_softmax(network.head(head, x))
    expected = -np.take_along_axis(np.asarray(logs)[:, :-1], np.asarray(ids)[:, 1:, None], axis=-1).mean()
    assert float(evaluation_loss(network, params, ids)) == pytest.approx(expected, rel=1e-5)


def test_the_bundled_folder_is_small_and_whole():
    assert {path.name for path in BUNDLED.iterdir()} == WRITTEN | {"README.md"}
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 6_000_000


def test_the_bundled_weights_are_a_llama_of_eight_blocks():
    checkpoint = open_checkpoint(str(BUNDLED))
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    network = make_network(checkpoint.config)
    network.check({name: info.shape for name, info in checkpoint.tensors.items()})
    assert network.num_blocks == 8
    for name in checkpoint.tensors:
        assert np.isfinite(checkpoint.read(name).astype(np.float32)).all(), name


def test_the_bundled_tokenizer_fits_weights_and_texts():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    config = json.loads((BUNDLED / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    for name in ("heldout.txt", "calibration.txt"):
        text = (BUNDLED / name).read_text()
        ids = tokenizer(text)["input_ids"]
        assert len(ids) >= 3 * 256
        assert tokenizer.decode(ids) == text
    heldout, calibration = ((BUNDLED / name).read_text() for name in ("heldout.txt", "calibration.txt"))
    assert not set(heldout.splitlines()) & {line for line in calibration.splitlines() if len(line) > 40}


def test_the_bundled_model_predicts_text_that_it_has_not_seen():
    record = json.loads((BUNDLED / "training.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = np.array(tokenizer((BUNDLED / "heldout.txt").read_text())["input_ids"][: 16 * 256], np.int32)
    loss = evaluated(BUNDLED, ids, 256)
    assert loss == pytest.approx(record["loss"]["heldout"], abs=0.3)
    frequencies = np.bincount(ids, minlength=len(tokenizer))[ids] / ids.size
    assert loss < -np.log(frequencies).mean() - 1  # better by far than the best guess without context
