"""The fine-tuning program: a run's files, and what it says about mistakes."""

import contextlib
import csv
import io
import json
import sys

import h5py
import jax
import numpy as np
import pytest
from dpot_helpers import write_fields

from sciml import checkpoints, dpot, preparation
from sciml.config import Config
from sciml.flow_config import file_name
from sciml.model import NAMED, ModelConfig, make_network

MINI = ModelConfig(width=16, depth=1, num_blocks=2, modes=2, out_width=8)
SMALL = ["--resolution", 8, "--patch-size", 4, "--batch-size", 4, "--epochs", 3, "--model", "mini", "--noise", 1e-3]


@pytest.fixture(scope="module", autouse=True)
def mini():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMED, "mini", MINI)  # quick to compile
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    return write_fields(folder / "fine.hdf5"), write_fields(folder / "pre.hdf5", seed=1)


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sciml.dpot", *map(str, arguments)])
        dpot.main()


def finish(out, *arguments):
    """Return the directory of a run, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call(*arguments, "--out", out)
    (run,) = out.iterdir()
    return run, printed.getvalue()


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run of all three settings, and what it printed."""
    settings = ["--data", files[0], "--pretrain-data", files[1], "--pretrain-epochs", 3, *SMALL]
    settings += ["--tb", "farms", "--against", "none", "sigmoid", "--layers", "all"]
    return finish(tmp_path_factory.mktemp("out"), *settings)


@pytest.mark.slow
def test_a_run_leaves_its_files(finished, files):
    run, printed = finished
    assert str(run) in printed
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['before']['test_l2re']:.4e}" in printed
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
def test_exported_weights_start_another_run(finished, files):
    weights = finished[0] / "farms" / "seed0" / "model.safetensors"
    experiment = preparation.prepare(preparation.complete(Config(data=str(files[0]), weights=weights)))
    config = experiment.config
    assert (config.model, config.resolution, config.patch_size, config.normalize) == ("mini", 8, 4, False)
    start, exported = checkpoints.to_torch(experiment.initial(0), experiment.model), checkpoints.read(weights)
    assert start.keys() == exported.keys()
    assert all(np.array_equal(start[name], exported[name]) for name in exported)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "data"])
def test_other_weights_or_data_are_refused(finished, what, tmp_path, capsys):
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
        call("--resume", tmp_path / "run")
    assert f"--resume: the {what} are not those" in capsys.readouterr().err


def test_generated_data_are_made_for_all_settings(tmp_path, monkeypatch):
    made = []

    def generate(path, flow):
        made.append((path, flow))
        path.parent.mkdir(exist_ok=True)
        return write_fields(path, steps=21)

    monkeypatch.setattr(preparation, "generate", generate)
    experiment = preparation.prepare(preparation.complete(Config(data_dir=tmp_path)))
    assert experiment.config.settings() == ("none", "sigmoid", "farms")
    flows = [preparation.FINETUNE_FLOW, preparation.PRETRAIN_FLOW]
    assert made == [(tmp_path / "generated" / file_name(flow), flow) for flow in flows]
    assert [experiment.finetune.name, experiment.pretrain.name] == [file_name(flow) for flow in flows]


def test_weights_of_no_named_model_are_refused(files, tmp_path, capsys):
    model = ModelConfig(image_size=8, patch_size=4, width=8, depth=1, num_blocks=1, out_width=4)
    weights = tmp_path / "odd.safetensors"
    checkpoints.save(weights, jax.jit(make_network(model).init)(jax.random.key(0)), model)
    with pytest.raises(SystemExit):
        call("--data", files[0], "--weights", weights, "--out", tmp_path / "runs")
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
        call(*given, *([] if "--recipe" in given or "--resume" in given else ["--resolution", "8"]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sciml.dpot: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
