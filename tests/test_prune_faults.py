"""Wrong input and a full disk: one clear error, before long work, and nothing is damaged."""

import dataclasses
import errno
import os
import resource
import sys

import numpy as np
import pytest
from prune_helpers import DATA, bytes_of, command, small_run, weights_of, write_folder

import prune.output
import prune.perplexity
import prune.pruning
import prune.record
import prune.run
import prune.scores
from farms_jax.errors import InputError
from prune import evaluate, llama
from prune.forward import NotFiniteError
from prune.job import prepare
from prune.run import run

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def no_long_work(monkeypatch):
    """Fails where a model is read through, or analysed."""

    def reached(*arguments, **keywords):
        pytest.fail("long work began")

    for module in (prune.pruning, prune.scores, prune.perplexity):
        monkeypatch.setattr(module, "embed", reached)
        monkeypatch.setattr(module, "run_blocks", reached)
    monkeypatch.setattr(prune.scores, "measure_alphas", reached)


def assert_refused(config, message):
    """One error that says this, and nothing of a model."""
    with pytest.raises(InputError, match=message):
        run(prepare(config))
    assert not list(config.out.rglob("model*"))


# --- The model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, rf"(?s)1 tensor\(s\) do not fit.* missing: {UP} \[256, 96\]$"),
        (
            {UP: np.nan, "model.norm.weight": -np.inf},
            rf"source: NaN or Inf in {UP}, model\.norm\.weight; .* get it again",
        ),
    ],
    ids=["a tensor left out", "NaN and Inf"],
)
@pytest.mark.usefixtures("no_long_work")
def test_a_model_that_cannot_be_used_is_refused(changes, message, tmp_path):
    tensors = weights_of("llama_tiny")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name].flat[7] = value
    source = write_folder(tmp_path / "source", tensors, shards=2)
    before = bytes_of(source)
    assert_refused(small_run(tmp_path, source, allocation="uniform"), message)
    assert bytes_of(source) == before


def test_masks_may_be_infinite(tmp_path):
    mask = {"model.causal_mask": np.triu(np.full((8, 8), -np.inf, np.float32), 1)}
    prepare(small_run(tmp_path, write_folder(tmp_path / "source", weights_of("llama_tiny") | mask)))


# --- What overflows --------------------------------------------------------------------------------------------------


def overflowing(folder, name, factor):
    """A model whose weights are finite, one of them too large."""
    return write_folder(
        folder, {k: v * np.float32(factor if k == name else 1) for k, v in weights_of("llama_tiny").items()}
    )


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        (UP, 1e38, "dense perplexity: the outputs of block 2 are not finite; .* get the checkpoint again"),
        ("lm_head.weight", 1e38, r"the losses of \d+ of 3 sequences are not finite"),
        ("lm_head.weight", 1e6, r"dense perplexity: a mean loss of \S+ nats has no finite perplexity"),
    ],
)
def test_a_network_that_overflows_has_no_result(name, factor, message, tmp_path):
    source = overflowing(tmp_path / "source", name, factor)
    with pytest.raises(NotFiniteError, match=message):
        run(prepare(small_run(tmp_path, source, allocation="uniform")))
    assert not list(tmp_path.rglob("run.json"))
    with pytest.raises(InputError, match=message.partition("perplexity")[2] or message):
        evaluate.run(evaluate.Config(str(source), text=str(tmp_path / "text.npy"), length=40))


def test_epsilons_of_models_that_overflow_are_never_chosen(tmp_path, monkeypatch):
    found = iter([3.0, None, 2.0, None, 5.0, 4.0])

    def trial(*_, **__):
        value = next(found)
        if value is None:
            raise NotFiniteError("block 1")
        return prune.pruning.Simulation(value, 0.5, [])

    monkeypatch.setattr(prune.pruning, "simulate", trial)
    job = prepare(small_run(tmp_path, epsilon="auto", samples=4))
    with prune.record.opened(tmp_path / "run") as record:
        assert prune.run.find_epsilon(job, dict.fromkeys(job.network.layer_shapes(), 1.0), record) == 0.2
        assert list(record.get("trials").values()) == [3.0, None, 2.0, None, 5.0, 4.0]
        with pytest.raises(ValueError, match="JSON"):
            record.put("perplexity", float("nan"))


# --- Settings and texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.2}, r"^--sparsity must be in \[0, 1\), the fraction to remove; got 1\.2$"),
        ({"sparsity": float("nan")}, r"^--sparsity .*got nan$"),
        ({"groups": "3:2"}, r"^--groups must read N:M with 0 < N < M, such as 2:4; got '3:2'$"),
        ({"groups": "2:7"}, r"^--groups 2:7: the 96 inputs of model\.layers\.0.*q_proj are no multiple of 7"),
        ({"groups": "2:4", "sparsity": 0.75, "allocation": "uniform"}, r"^--sparsity 0\.75 is not --groups 2:4; leave"),
        ({"epsilon": "foo"}, r"^--epsilon must be a number in \[0, 1\) or auto, got 'foo'$"),
        ({"epsilon": "nan"}, r"^--epsilon must be in \[0, 1\) or auto, got nan$"),
        ({"length": 513}, r"^--length 513 is more than the 512 positions of the model$"),
        ({"length": 1}, r"^--length must be at least 2"),
        ({"samples": 0}, r"^--samples must be above 0, got 0$"),
        ({"seed": -1}, r"^--seed must not be below 0, got -1$"),
        ({"method": "wanda_variant"}, r"^--method wanda_variant .* needs --allocation uniform"),
        ({"budget": "reference", "allocation": "owl"}, r"^--budget reference is defined for farms and alphapruning"),
        ({"length": 200}, r"^--text .*text\.npy: has 120 tokens, fewer than one sequence of 200; give --length 120"),
        ({"length": 64, "samples": 9}, r"^--calibration .*calibration\.npy: has 8 sequences, 9 are asked for"),
        ({"tokenizer": "no/such folder"}, r"^--tokenizer no/such folder: no such folder"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_long_work")
def test_settings_that_cannot_be_met_are_refused(changes, message, tmp_path):
    assert_refused(dataclasses.replace(small_run(tmp_path), **changes), message)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.usefixtures("no_long_work")
def test_an_output_that_is_no_folder_is_refused(fresh, tmp_path):
    config = small_run(tmp_path, fresh=fresh)
    config.out.write_text("a file")
    assert_refused(config, r"^--out: cannot make .*; name another folder")
    assert config.out.read_text() == "a file"


def test_the_program_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(small_run(tmp_path, sparsity=1.2))[2:])
    with pytest.raises(SystemExit, match="2"):
        llama.main()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "prune.llama: --sparsity must be in [0, 1), the fraction to remove; got 1.2\n")


# --- No space left on disk -------------------------------------------------------------------------------------------


def fail_at(call, number):
    """The same function, but its call of this number finds the disk full."""
    calls = 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number:
            raise FULL
        return call(*arguments, **keywords)

    return counted


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "masks"])
@pytest.mark.usefixtures("no_long_work")
def test_no_space_for_the_model_is_known_at_the_start(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fail_at(os.posix_fallocate, number))
    # What did find room is given back.
    assert_refused(small_run(tmp_path), r"model\.part: cannot write 2 MiB \(No space left on device\); free space, or ")


@pytest.mark.usefixtures("no_long_work")
def test_no_space_under_a_real_limit(tmp_path):
    """The system refuses files of more than a megabyte."""
    config, before = small_run(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        assert_refused(config, r"model\.part: cannot write 2 MiB \(File too large\); free space, or name another --out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# 3 calls for the tensors outside the blocks, then 2 for each block, its weights and its masks.
PLACES = {
    "weights of block 1": (prune.output.os, "fsync", 6),
    "masks of block 2": (prune.output.os, "fsync", 9),
    "record": (prune.record, "write_json", 20),
    "card": (prune.run, "write_json", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_space_on_the_way_keeps_what_is_done(place, finished, tmp_path, monkeypatch):
    module, name, number = PLACES[place]
    source = bytes_of(DATA / "llama_tiny")
    config = dataclasses.replace(finished.config, out=tmp_path / "out")
    pruned = []
    prune_block = prune.pruning.prune_block
    monkeypatch.setattr(prune.pruning, "prune_block", lambda *a: pruned.append(a[1]) or prune_block(*a))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_at(getattr(module, name), number))
        with pytest.raises(InputError, match=r"No space left on device.*free space.* the same command"):
            run(prepare(config))
    assert not (prepare(config).path / "run.json").exists()
    run(prepare(config))
    assert bytes_of(prepare(config).path / "model") == bytes_of(finished.path / "model")
    # No block was done twice but the one that was being written.
    assert len(pruned) <= 5
    assert bytes_of(DATA / "llama_tiny") == source
