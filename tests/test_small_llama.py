"""The program that trained the small model that ships: its texts, its loss, and a training of seconds."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_helpers import logits_of
from transformers import AutoTokenizer

from experiments._corpus import END, clean, encode, read_corpus, train_tokenizer
from experiments._stacked_llama import consecutive, evaluation_loss, from_tensors, to_tensors
from experiments.small_llama import Config, draw, train
from farms_jax.errors import InputError
from prune.checkpoints import open_checkpoint


def story(articles, seed=0, titles=True):
    """Text of few words in a fixed order of kinds: much to learn in few steps."""
    rng = np.random.default_rng(seed)
    kinds = [["the", "a"], ["small", "old", "red"], ["cat", "fox", "hen"], ["sees", "eats"], ["it", "them"], [".", "."]]
    lines = []
    for number in range(articles):
        lines += [f" = Tale {number} = " if titles else "", " "]
        lines += [" ".join(words[rng.integers(len(words))] for words in kinds) for _ in range(12)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Texts, and settings of a training that takes seconds."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "first.txt").write_text(story(30))
    (folder / "last.txt").write_text(story(40, seed=1))
    text = (folder / "first.txt", folder / "last.txt")
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "blocks": 2, "heads": 2, "kv_heads": 1}
    apart = {"heldout_bytes": 700, "validation_bytes": 700, "calibration_bytes": 1500}
    schedule = {"length": 16, "steps": 40, "learning_rate": 1e-2, "warmup": 5, "evaluate_every": 10}
    return Config(text, folder / "model", **sizes, **apart, **schedule)


@pytest.fixture(scope="module")
def record(config):
    """Record of a training; its folder is only read."""
    return train(config)


def tensors_of(checkpoint):
    return {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.tensors}


@pytest.mark.slow
def test_training_writes_a_model_that_has_learnt(config, record):
    assert json.loads((config.out / "training.json").read_text()) == json.loads(json.dumps(record))
    checkpoint = open_checkpoint(str(config.out))
    checkpoint.network()
    assert {str(info.dtype) for info in checkpoint.tensors.values()} == {"float16"}
    losses = [line["validation"] for line in record["history"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert losses[record["kept_step"] // 10 - 1] == min(losses)
    assert abs(record["loss"]["validation"] - min(losses)) < 1e-2  # float16 apart
    assert record["loss"]["heldout"] < math.log(checkpoint.config["vocab_size"]) - 1


@pytest.mark.slow
def test_losses_in_the_record_are_those_of_the_folder(config, record):
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    text = (config.out / "heldout.txt").read_text().replace("= Tale", f"{END}= Tale")
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    checkpoint = open_checkpoint(str(config.out))
    network = checkpoint.network()
    params = from_tensors(network, tensors_of(checkpoint))
    loss = float(evaluation_loss(network, params, consecutive(ids, config.length)))
    assert loss == pytest.approx(record["loss"]["heldout"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("record")
def test_training_differentiates_the_network_that_is_pruned(config):
    checkpoint = open_checkpoint(str(config.out))
    network, tensors = checkpoint.network(), tensors_of(checkpoint)
    params = from_tensors(network, tensors)
    for name, array in to_tensors(network, params).items():
        np.testing.assert_array_equal(array, tensors[name])
    ids = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    logs = jax.nn.log_softmax(logits_of(network, tensors, ids))
    expected = -np.take_along_axis(np.asarray(logs)[:, :-1], np.asarray(ids)[:, 1:, None], axis=-1).mean()
    assert float(evaluation_loss(network, params, ids)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e30}, "lower --learning-rate"),
        ({"heldout_bytes": 10**6}, "too short for 1000000 bytes"),
        ({"length": 2000}, "no more than --length"),
    ],
)
def test_training_that_cannot_succeed_writes_no_model(config, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, out=tmp_path / "model", **change))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("titles", [True, False])
def test_texts_are_cut_from_the_end_at_articles_or_lines(tmp_path, titles):
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        path.write_text(story(20, seed=number, titles=titles))
    corpus = read_corpus(paths, heldout=500, validation=300, calibration=1000)
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


def test_every_text_has_tokens_and_articles_begin_with_the_end_token():
    tokenizer = train_tokenizer(story(5), 300)
    text = "Ünïcode, 漢字 and\ttabs 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(END) == 0
    text = clean(story(3))
    ids = encode(tokenizer, text)
    assert (ids == 0).sum() == 3
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == text


def test_draws_depend_on_the_step_alone(config):
    ids = np.arange(500, dtype=np.int32)
    first, again, later = draw(ids, config, 7), draw(ids, config, 7), draw(ids, config, 8)
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()
    assert first.shape == (4, 17)
    np.testing.assert_array_equal(np.diff(first), 1)
