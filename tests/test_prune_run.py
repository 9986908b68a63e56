"""Pruning runs: the model, masks, card and plots that they write; stopped, given again, dry; the memory they take."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import types
from importlib.metadata import version

import ml_dtypes
import numpy as np
import pytest
from helpers import few
from matplotlib import image
from prune_helpers import (
    DATA,
    Killed,
    assert_same_run,
    byte_tokenizer,
    bytes_of,
    card_of,
    command,
    config_of,
    folder_with_tokenizer,
    numbers_of,
    small_run,
    weights_of,
    write_folder,
    write_random_llama,
)
from safetensors.numpy import load_file

import prune.job
import prune.output
import prune.perplexity
import prune.pruning
import prune.record
import prune.run
import prune.scores
from farms_jax.programs.memory import peak_memory
from prune.config import Config
from prune.job import prepare
from prune.output import read_masks
from prune.run import run

ROOT = DATA.parent.parent
MIB = 2**20


# --- Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shards", "method"), few([(ml_dtypes.bfloat16, 2, "wanda"), (np.float32, 1, "sparsegpt")], 2)
)
def test_nothing_removed_gives_the_same_bytes_back(dtype, shards, method, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in weights_of("llama_tiny").items()}
    source = write_folder(tmp_path / "source", tensors, shards=shards)
    (source / "generation_config.json").write_text('{"do_sample":  false}')
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    job = prepare(small_run(tmp_path, source, method=method, allocation="uniform", sparsity=0.0))
    run(job)
    found, expected = bytes_of(job.path / "model"), bytes_of(source)
    del found["SHA256SUMS"], found["README.md"], expected["pytorch_model.bin"]
    assert found == expected
    assert all(mask.all() for mask in read_masks(job.path).values())
    assert card_of(job.path)["perplexity"]["pruned"] == card_of(job.path)["perplexity"]["dense"]


def assert_pruned(job, count):
    """The masks of `count` layers are their zeros; nothing else has changed."""
    masks, before = read_masks(job.path), load_file(job.checkpoint.path / "model.safetensors")
    after = load_file(job.path / "model/model.safetensors")
    assert len(masks) == count
    for layer, mask in masks.items():
        np.testing.assert_array_equal(after[f"{layer}.weight"] != 0, mask, err_msg=layer)
        before[f"{layer}.weight"] *= mask
    assert set(before) == set(after)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    reached = {row["layer"]: row["reached"] for row in card_of(job.path)["allocation"]["layers"]}
    assert reached == pytest.approx({layer: 1 - mask.mean() for layer, mask in masks.items()})


def test_masks_are_the_zeros_and_all_else_is_as_it_was(finished):
    assert_pruned(finished, 28)


@pytest.mark.slow
def test_masks_of_another_family(tmp_path):
    job = prepare(small_run(tmp_path, "opt_tiny", allocation="owl"))
    run(job)
    assert_pruned(job, 12)


# --- The card --------------------------------------------------------------------------------------------------------


def test_card_holds_all_that_the_numbers_depend_on(finished):
    card, (arrays, numbers) = card_of(finished.path), numbers_of("llama_tiny")
    asked = {field.name for field in dataclasses.fields(Config)} - {"out"}
    assert set(card["settings"]) == asked
    assert (card["settings"]["method"], card["settings"]["seed"], card["settings"]["sparsity"]) == ("wanda", 0, 0.5)
    assert card["model"]["config"] == config_of("llama_tiny")
    assert card["evaluation"]["ids_sha256"] == hashlib.sha256(arrays["ids"].astype("<i4").tobytes()).hexdigest()
    stream = np.load(finished.config.calibration).ravel()
    drawn = np.stack([stream[start : start + 40] for start in card["calibration"]["positions"]])
    assert card["calibration"]["ids_sha256"] == hashlib.sha256(drawn.astype("<i4").tobytes()).hexdigest()
    assert card["versions"]["jax"] == version("jax")
    assert {"farms-jax", "jaxlib", "numpy", "transformers"} <= set(card["versions"])
    assert card["perplexity"]["dense"] == pytest.approx(np.exp(numbers["loss_mean"]), rel=1e-5)
    assert card["perplexity"]["pruned"] == pytest.approx(np.exp(np.mean(card["nll_per_block"]["pruned"])))
    assert card["perplexity"]["pruned"] != card["perplexity"]["dense"]
    stages = {"dense", "alphas", "scores", "epsilon", "sparsity", "blocks", "pruned", "alphas after"}
    assert set(card["seconds"]) == stages
    assert len(card["seconds_per_block"]) == 4
    assert 100 * MIB < card["peak_memory_bytes"] <= peak_memory()


def test_card_holds_the_allocation(finished):
    card = card_of(finished.path)
    allocation, rows = card["allocation"], card["allocation"]["layers"]
    assert (allocation["by"], allocation["granularity"], allocation["epsilon"]) == ("farms", "block", {"value": 0.3})
    weights = {name.removesuffix(".weight"): w.size for name, w in weights_of("llama_tiny").items() if "_proj" in name}
    assert {row["layer"]: row["weights"] for row in rows} == weights
    for column, name in (("sparsity", "asked"), ("reached", "reached")):
        mean = np.average([row[column] for row in rows], weights=[row["weights"] for row in rows])
        assert mean == pytest.approx(card["sparsity"][name])
    assert all(row["alpha"] > 1 and row["alpha_after"] > 1 and row["alpha"] != row["alpha_after"] for row in rows)
    with (finished.path / "layers.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["layer"] for row in table] == [row["layer"] for row in rows]
    assert [float(row["alpha"]) for row in table] == [row["alpha"] for row in rows]


def test_plots_show_something(finished):
    for name in ("sparsity.png", "alphas.png", "perplexity.png"):
        pixels = image.imread(finished.path / name)[..., :3]
        # Ink of the first line's colour.
        assert (np.abs(pixels - np.array([0x1F, 0x77, 0xB4]) / 255).max(-1) < 0.02).sum() > 200, name


def test_hash_is_of_the_weights_whatever_their_files(finished, tmp_path):
    tensors = weights_of("llama_tiny")

    def hash_of(name, **changes):
        folder = write_folder(tmp_path / name, tensors | changes, shards=2)
        return prepare(small_run(tmp_path, folder)).weights

    assert hash_of("sharded") == finished.weights
    changed = tensors["model.norm.weight"].copy()
    changed[5] += 1e-6
    assert hash_of("changed", **{"model.norm.weight": changed}) != finished.weights


@pytest.mark.slow
def test_text_goes_through_the_tokenizer_and_a_given_one_goes_with_the_model(tmp_path):
    model, other, text = folder_with_tokenizer("llama_tiny", tmp_path), tmp_path / "other", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)  # a byte is a token
    config = small_run(tmp_path, model, method="magnitude", allocation="uniform", text=str(text), limit=5)
    own = prepare(config)
    assert (own.evaluation.record["count"], own.evaluation.record["tokens"]) == (5, 9 * 45)
    byte_tokenizer(begin=True).save_pretrained(other)
    job = prepare(dataclasses.replace(config, tokenizer=str(other)))
    run(job)
    card = card_of(job.path)
    assert card["evaluation"]["tokens"] == 9 * 45 + 1
    assert card["evaluation"]["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert len(card["tokenizer_sha256"]) == 64
    found, given = (json.loads((folder / "tokenizer.json").read_text()) for folder in (job.path / "model", other))
    assert found == given
    # Also where the texts are token ids, which need none.
    ids = dataclasses.replace(job.config, text=config.calibration)
    assert prepare(ids).tokenizer.bos_token == job.tokenizer.bos_token


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
        monkeypatch.setattr(module, "run_blocks", None)  # would fail where it is called
    monkeypatch.setattr(prune.scores, "measure_alphas", None)
    monkeypatch.setattr(prune.run, "make_card", None)  # would say that these versions had computed it
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
    with monkeypatch.context() as patch:  # neither texts nor evaluations
        for name in ("evaluation_blocks", "calibration_samples", "choose_tokenizer"):
            patch.setattr(prune.job, name, None)
        patch.setattr(prune.run, "perplexity", None)
        table = run(prepare(dataclasses.replace(config, dry_run=True)))
    assert sorted(path.name for path in config.out.iterdir()) == ["cache"]
    rows = [line.split() for line in table.splitlines() if line.startswith("model.layers.")]
    assert [row[0] for row in rows] == [f"model.layers.{block}" for block in range(4)]
    # Blocks of one size; figures are printed with four decimals.
    assert np.mean([float(row[2]) for row in rows]) == pytest.approx(0.5, abs=1e-4)
    weights = weights_of("llama_tiny")
    everything = sum(weight.size for weight in weights.values())
    inside = sum(weight.size for name, weight in weights.items() if "_proj" in name)
    assert f"0.5000 of {inside / 1e6:.2f} M block weights, {inside / 2 / everything:.4f} of all" in table
    kept = 4 * (everything - inside / 2) + inside / 8
    assert f"size: {4 * everything / MIB:.1f} MiB in float32, zeros and all; {kept / MIB:.1f} MiB with" in table

    measured, evaluated = [], []
    analyze, perplexity = prune.scores.farms_jax.analyze, prune.run.perplexity
    monkeypatch.setattr(prune.scores.farms_jax, "analyze", lambda *a, **k: measured.append(1) or analyze(*a, **k))
    monkeypatch.setattr(prune.run, "perplexity", lambda *a, title, **k: evaluated.append(title) or perplexity(*a, **k))
    capsys.readouterr()
    job = prepare(config)
    run(job)
    assert (len(measured), evaluated) == (4, ["dense perplexity", "pruned perplexity"])  # 4 blocks after pruning
    assert table in capsys.readouterr().out
    assert_same_run(job.path, finished.path)


def test_dry_run_takes_nothing_away(finished, finished_copy):
    before = bytes_of(finished_copy.config.out)
    config = dataclasses.replace(finished_copy.config, dry_run=True, fresh=True)
    assert "block weights" in run(dataclasses.replace(finished_copy, config=config))
    assert bytes_of(finished_copy.config.out) == before


def test_dry_run_reads_calibration_text_where_the_allocation_needs_it(tmp_path, monkeypatch):
    """And leaves the search of epsilon, which prunes, to the run."""
    config = small_run(tmp_path, allocation="owl", epsilon="auto", dry_run=True)
    monkeypatch.setattr(prune.job, "evaluation_blocks", None)
    table = run(prepare(config))
    assert table.endswith("--epsilon auto is searched by the run; this is the allocation at 0.08")
    given = run(prepare(dataclasses.replace(config, epsilon="0.08")))
    assert table.startswith(given)
    assert not config.out.exists()


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
    peaks = []
    for blocks in (4, 44):
        folder = tmp_path / str(blocks)
        model = write_random_llama(folder, blocks=blocks, hidden=512, intermediate=1536)
        config = small_run(folder, model, allocation="uniform")
        subprocess.run(command(config), cwd=ROOT, capture_output=True, check=True)
        peaks.append(card_of(next(config.out.glob("*-wanda-*")))["peak_memory_bytes"])
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        shutil.rmtree(folder)  # too large to lie about
    # All that the program takes, Python and JAX included, is less than the weights alone.
    assert peaks[1] < weights
    assert peaks[1] - peaks[0] < weights / 8
