"""The fine-tuning program: a run's files, and what it says about mistakes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from dpot_helpers import write_fields

from sciml import checkpoints, dpot, preparation
from sciml.config import Config
from sciml.flow_config import FlowConfig
from sciml.model import ModelConfig, make_network

ROOT = Path(__file__).parent.parent
# One step for all runs here, so that they share what is compiled.
SMALL = ["--resolution", "8", "--patch-size", "4", "--batch-size", "4", "--epochs", "3", "--model", "mini"]
SMALL += ["--noise", "1e-3", "--rollout-steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    return write_fields(folder / "fine.hdf5"), write_fields(folder / "pre.hdf5", seed=1)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sciml.dpot", *map(str, arguments)])
    dpot.main()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache, flags = tmp_path_factory.mktemp("cache"), "--xla_backend_optimization_level=0"  # compiling takes the time
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def started(environment, out, *arguments):
    """The directory of a run in a process of its own, and what it printed."""
    program = [sys.executable, "-m", "sciml.dpot", *map(str, arguments), "--out", str(out)]
    done = subprocess.run(program, env=environment, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = out.iterdir()
    return run, done.stdout


@pytest.fixture(scope="module")
def finished(files, environment, tmp_path_factory):
    """A run of all three settings, and what it printed."""
    settings = ["--data", files[0], "--pretrain-data", files[1], "--pretrain-epochs", 3, *SMALL]
    settings += ["--tb", "farms", "--against", "none", "sigmoid", "--layers", "all"]
    return started(environment, tmp_path_factory.mktemp("out"), *settings)


@pytest.mark.slow
def test_a_run_leaves_its_files(finished):
    run, printed = finished
    assert str(run) in printed
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["settings"]) == ["none", "sigmoid", "farms"]
    for tb, row in summary["settings"].items():
        assert f"{row['last']['mean']:.4e}" in printed
        lines = [json.loads(line) for line in (run / tb / "seed0" / "metrics.jsonl").open()]
        assert [line["epoch"] for line in lines] == [0, 1, 2]
        assert row["seeds"]["0"]["last"] == lines[-1]["test_l2re"]
        assert len(lines[0]["test_l2re_by_step"]) == 3  # 13 steps, 10 of them given
        layers = list(csv.DictReader((run / tb / "seed0" / "layers.csv").open()))
        assert {row["epoch"] for row in layers} == {"0", "1", "2", "3"}
        assert any("filter/w1" in row["layer"] for row in layers)
        moved = {float(row["lr_scale"]) for row in layers} != {1.0}
        assert moved == (tb != "none")
    pictures = {"rollout", "alphas", "alphas_by_layer"}
    pictures |= {f"{kind}_{tb}" for kind in ("prediction", "layers") for tb in summary["settings"]}
    assert {path.stem for path in run.glob("*.png")} == pictures


@pytest.mark.slow
def test_predictions_are_there_as_numbers(finished, files):
    run, _ = finished
    shown = np.load(run / "prediction_farms.npz")
    assert shown["true"].shape == shown["predicted"].shape == (8, 8, 3, 4)
    np.testing.assert_array_equal(shown["step"], [10, 11, 12])
    with h5py.File(files[0]) as file:  # the last tenth is the test set: one trajectory
        np.testing.assert_array_equal(shown["true"][..., 2], file["density"][9, 10:].transpose(1, 2, 0))


@pytest.mark.slow
def test_every_setting_starts_from_the_pretrained_weights(finished):
    run, _ = finished
    pretrained = checkpoints.read(run / "pretrain" / "model.safetensors")
    first = [json.loads((run / tb / "seed0" / "metrics.jsonl").open().readline()) for tb in ("none", "farms")]
    assert first[0]["test_l2re"] != first[1]["test_l2re"]
    final = checkpoints.read(run / "farms" / "seed0" / "model.safetensors")
    assert not np.array_equal(pretrained["pos_embed"], final["pos_embed"])
    np.testing.assert_array_equal(pretrained["cls_head.0.weight"], final["cls_head.0.weight"])


@pytest.mark.slow
def test_exported_weights_start_another_run(finished, files, environment, tmp_path):
    run, _ = finished
    weights = run / "farms" / "seed0" / "model.safetensors"
    given = ["--data", files[0], "--weights", weights, "--tb", "none", "--batch-size", 4, "--epochs", 1]
    other, _ = started(environment, tmp_path, *given)
    settings = json.loads((other / "config.json").read_text())["config"]
    assert [settings[key] for key in ("model", "resolution", "patch_size", "normalize")] == ["mini", 8, 4, False]
    before = json.loads((other / "summary.json").read_text())["before"]["test_l2re"]
    last = json.loads((run / "farms" / "seed0" / "metrics.jsonl").read_text().splitlines()[-1])["test_l2re"]
    assert before == pytest.approx(last, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "data"])
def test_other_weights_or_data_are_refused(finished, what, tmp_path, monkeypatch, capsys):
    run, _ = finished
    facts = json.loads((run / "config.json").read_text())
    if what == "weights":
        facts["config"] |= {"weights": str(run / "farms" / "seed0" / "model.safetensors"), "pretrain_data": None}
        facts["data"].pop("pretrain")
    else:
        facts["config"]["data"] = str(write_fields(tmp_path / "fine.hdf5", seed=5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit):
        call(monkeypatch, "--resume", tmp_path / "run")
    assert f"--resume: the {what} are not those" in capsys.readouterr().err


@pytest.mark.slow
def test_generated_data_are_made_for_all_settings(tmp_path, monkeypatch):
    for name, seed in (("PRETRAIN_FLOW", 1), ("FINETUNE_FLOW", 2)):
        flow = FlowConfig(mach=0.1, eta=0.1 / seed, zeta=0.1, size=16, count=10, steps=12, end=0.1, seed=seed)
        monkeypatch.setattr(preparation, name, flow)
    config = preparation.complete(Config(data_dir=tmp_path))
    prepared = preparation.prepare(config)
    assert config.settings() == ("none", "sigmoid", "farms")
    assert "Eta0.05" in prepared.finetune.name
    assert "Eta0.1_" in prepared.pretrain.name
    assert (len(prepared.finetune.train), len(prepared.finetune.test)) == (9, 1)
    assert len(list((tmp_path / "generated").glob("2D_CFD_Rand_*.hdf5"))) == 2


def test_weights_of_no_named_model_are_refused(files, tmp_path, monkeypatch, capsys):
    model = ModelConfig(image_size=8, patch_size=4, width=8, depth=1, num_blocks=1, out_width=4)
    weights = tmp_path / "odd.safetensors"
    checkpoints.save(weights, jax.jit(make_network(model).init)(jax.random.key(0)), model)
    with pytest.raises(SystemExit):
        call(monkeypatch, "--data", files[0], "--weights", weights, "--out", tmp_path / "runs")
    assert "odd.safetensors: 1 blocks of width 8 are none of the models mini, tiny" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.hdf5"], "nowhere.hdf5"),
        (["--data", "{fine}", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--data", "{fine}", "--in-steps", "13"], "13 time steps"),
        (["--data", "{fine}", "--patch-size", "3"], "--resolution 8 must be a multiple of --patch-size 3"),
        (["--recipe", "tiny-7-farms"], "there is no 'tiny-7-farms'"),
        (["--recipe", "tiny-5-farms"], "--data: the recipes"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--epochs", "3"], "leave out --epochs 3"),
    ],
)
def test_mistakes_are_one_line(arguments, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(fine=files[0]) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *given, *([] if "--recipe" in given or "--resume" in given else ["--resolution", "8"]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sciml.dpot: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
