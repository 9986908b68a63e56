"""Pruning runs: stopped and resumed, asked for again, dry; how much memory they take."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import types

import numpy as np
import pytest
from helpers import few
from prune_helpers import (
    DATA,
    Killed,
    assert_same_run,
    bytes_of,
    card_of,
    command,
    small_run,
    weights_of,
    write_random_llama,
)

import prune.output
import prune.perplexity
import prune.pruning
import prune.record
import prune.run
import prune.scores
from prune.job import prepare
from prune.run import run

ROOT = DATA.parent.parent
MIB = 2**20


def never(*arguments, **keywords):
    pytest.fail("computed again")


# --- Stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("steps", few([6, 5, 7], 3))
def test_stopped_between_any_two_writes(when, steps, finished, tmp_path, monkeypatch):
    """Every process of the run gets so many writes further, and is stopped right before or right after one."""
    left = 0

    def counted(call):
        def stop_at_last(*arguments, **keywords):
            nonlocal left
            left -= 1
            if not left and when == "before":
                raise Killed
            result = call(*arguments, **keywords)
            if not left:
                raise Killed
            return result

        return stop_at_last

    monkeypatch.setattr(prune.record, "write_json", counted(prune.record.write_json))
    of_its_own = types.SimpleNamespace(fsync=counted(os.fsync), replace=os.replace, strerror=os.strerror)
    monkeypatch.setattr(prune.output, "os", of_its_own)  # not the module that write_json uses too
    monkeypatch.setattr(prune.output.Output, "finish", counted(prune.output.Output.finish))
    monkeypatch.setattr(prune.run, "plot_run", counted(lambda *_: []))
    config = dataclasses.replace(finished.config, out=tmp_path / "out")
    for stops in itertools.count():
        left = steps
        try:
            run(prepare(config))
            break
        except Killed:
            assert stops < 50, "it does not get on"
    assert stops > 3
    assert_same_run(prepare(config).path, finished.path)


# --- Given again -----------------------------------------------------------------------------------------------------


def test_a_finished_run_given_again_says_the_same_and_computes_nothing(finished_run, finished_copy, monkeypatch):
    for module in (prune.pruning, prune.scores, prune.perplexity):
        monkeypatch.setattr(module, "run_blocks", never)
    monkeypatch.setattr(prune.scores, "measure_alphas", never)
    monkeypatch.setattr(prune.run, "make_card", never)  # would say that these versions had computed it
    (job, text), card = finished_run, (finished_copy.path / "run.json").read_bytes()
    assert run(finished_copy) == text.replace(str(job.config.out), str(finished_copy.config.out))
    assert (finished_copy.path / "run.json").read_bytes() == card


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "progress.json"])
def test_what_was_taken_away_from_a_finished_run_is_made_again(lost, finished, finished_copy):
    path = finished_copy.path
    shutil.rmtree(path / lost) if lost == "model" else (path / lost).unlink()
    run(finished_copy)
    assert_same_run(path, finished.path)


# --- Dry -------------------------------------------------------------------------------------------------------------


def test_dry_run_says_what_a_run_would_do_and_saves_it_the_analysis(finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(finished.config, out=tmp_path / "out")
    job = prepare(dataclasses.replace(config, dry_run=True))
    table = run(job)
    assert sorted(path.name for path in job.path.iterdir()) == [".lock", "progress.json"]
    rows = [line.split() for line in table.splitlines() if line.startswith("model.layers.")]
    assert [row[0] for row in rows] == [f"model.layers.{block}" for block in range(4)]
    # Blocks of one size; figures are printed with four decimals.
    assert np.mean([float(row[2]) for row in rows]) == pytest.approx(0.5, abs=1e-4)
    weights = weights_of("llama_tiny")
    everything = sum(weight.size for weight in weights.values())
    inside = sum(weight.size for name, weight in weights.items() if "_proj" in name)
    assert f"0.5000 of {inside / 1e6:.2f} M block weights, {inside / 2 / everything:.4f} of all" in table
    kept = 4 * (everything - inside / 2) + inside / 8
    assert f"size: {4 * everything / MIB:.1f} MiB dense; {kept / MIB:.1f} MiB with" in table

    measured, evaluated = [], []
    measure, perplexity = prune.scores.measure_alphas, prune.run.perplexity
    monkeypatch.setattr(prune.scores, "measure_alphas", lambda *a: measured.append(a[-1]) or measure(*a))
    monkeypatch.setattr(prune.run, "perplexity", lambda *a, title, **k: evaluated.append(title) or perplexity(*a, **k))
    capsys.readouterr()
    run(prepare(config))
    assert (measured, evaluated) == (["alphas after pruning"], ["pruned perplexity"])
    assert table in capsys.readouterr().out
    assert_same_run(job.path, finished.path)


def test_dry_run_takes_nothing_away(finished, finished_copy):
    config = dataclasses.replace(finished_copy.config, dry_run=True, fresh=True)
    assert "block weights" in run(dataclasses.replace(finished_copy, config=config))
    assert_same_run(finished_copy.path, finished.path)


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_spilled_activations_change_no_bit(finished, tmp_path):
    spill = tmp_path / "spill"
    job = prepare(dataclasses.replace(finished.config, out=tmp_path / "out", spill=spill))
    run(job)
    assert bytes_of(job.path / "model") == bytes_of(finished.path / "model")
    assert card_of(job.path)["nll_per_block"] == card_of(finished.path)["nll_per_block"]
    assert list(spill.iterdir()) == []


@pytest.mark.slow
def test_memory_is_that_of_a_block_not_of_the_model(tmp_path):
    model = write_random_llama(tmp_path / "model", blocks=44, hidden=512, intermediate=1536)
    config = small_run(tmp_path, model, allocation="uniform")
    subprocess.run(command(config), cwd=ROOT, capture_output=True, check=True)
    peak = card_of(next(config.out.glob("model-*")))["peak_memory_bytes"]
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    for folder in (model, config.out):  # too large to lie about
        shutil.rmtree(folder)
    # All that the program takes, Python and JAX included, is less than the weights alone.
    assert peak < weights
