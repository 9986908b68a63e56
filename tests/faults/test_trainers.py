"""Training under faults: stops in the middle of an epoch, losses that are not finite."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from dpot_helpers import write_fields
from helpers import few

import sciml.fine_tuning
import sciml.model
import sciml.preparation
import train.training
from farms_jax.errors import InputError
from farms_jax.programs.run_directory import SeedDirectory
from farms_jax.programs.stopping import Stopped
from farms_jax.weights import open_weights
from sciml import dpot
from sciml.config import Config as DPOTConfig
from sciml.stage import Stage, make_functions as make_dpot_functions, train_stage
from sciml.steps import make_evaluate
from train import cifar, vgg
from train.config import Config, resolve
from train.data import load
from train.training import make_functions, train_seed

ROOT = Path(__file__).parent.parent.parent
# Networks with fewer layers than the programs have: compiling takes most of the time here.
CONVOLUTIONS = {16: (1, 1, 1, 1, 1)}
MINI = sciml.model.ModelConfig(width=16, depth=1, num_blocks=2, modes=2, out_width=8, num_classes=3)
# A program that says when it begins its first epoch, and waits there for a line.
PROGRAM = f"""
import sciml.model, train.vgg
from farms_jax.programs.run_directory import SeedDirectory
from sciml.model import ModelConfig
train.vgg.CONVOLUTIONS = {CONVOLUTIONS}
sciml.model.NAMED["mini"] = {MINI}
append = SeedDirectory.append_layers
def append_and_wait(*arguments):
    append(*arguments)
    print("first epoch", flush=True)
    input()
SeedDirectory.append_layers = append_and_wait
"""


@pytest.fixture(scope="module", autouse=True)
def small_and_even():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.training, "_PIECE_SECONDS", 1e9)  # calls take 1, 2, 4, ... steps, however slow
        patch.setattr(vgg, "CONVOLUTIONS", CONVOLUTIONS)
        patch.setitem(sciml.model.NAMED, "mini", MINI)
        yield


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# Training networks for images

CIFAR = Config(
    dataset="digits", model="vgg16", width=0.0625, epochs=2, batch_size=16, limit_train=64, learning_rate=0.02
)
STEPS = 4


@pytest.fixture(scope="module")
def digits():
    """Settings, data and compiled functions."""
    images = load("digits", limit_train=64)
    config = resolve(CIFAR, small=True)
    functions = make_functions(config, images)

    def steps(state, *rest):
        # As a restored state is; otherwise the steps would compile for both kinds.
        return functions.steps(jax.device_put(state, jax.devices()[0]), *rest)

    return config, images, functions._replace(steps=steps)


def train_digits(folder, digits, **changed):
    config, images, functions = digits
    with SeedDirectory(folder) as directory:
        return train_seed(directory, 43, config, images, functions._replace(**changed))


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A training that was never broken off."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_digits(folder, digits)


def lines_of(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if "seconds" not in key} for line in metrics]
    return timeless, list(csv.reader((folder / "layers.csv").open()))


def stopping_at(function, number):
    """The function, whose call of that number asks the process to stop."""
    calls = iter(range(1, 1000))

    def called(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    return called


def assert_traced(error, folder, done, where, layer, advice):
    """The message names step and layer; the state before is kept, and only whole epochs are in the lines."""
    kept = folder / "checkpoints" / "last" / str(done)
    assert str(error.value) == (
        f"{where}; first not finite: output of {layer}; the state before that step is kept in {kept}; --resume takes "
        f"the step again, and if it ends the same, start anew with {advice}"
    )
    with open_weights(kept) as source:
        assert all(np.isfinite(source.read(name)).all() for name in source.tensors)
    assert [line["epoch"] for line in lines_of(folder)[0]] == [0]


# The calls of an epoch take 1, 2 and 1 steps. After the last step the epoch's test and lines come first.
@pytest.mark.parametrize(("number", "done"), few([(2, 3), (3, 4), (6, 8)], 3))
def test_training_stopped_at_a_step_ends_as_one_that_was_not(digits, whole, tmp_path, number, done, capsys):
    with pytest.raises(Stopped):
        train_digits(tmp_path, digits, steps=stopping_at(digits[2].steps, number))
    checkpoints = sorted(int(path.name) for path in (tmp_path / "checkpoints" / "last").iterdir())
    assert checkpoints[-1] == done
    assert (tmp_path / "checkpoints" / "last" / str(done) / "partial_epoch.json").is_file() == (done % STEPS > 0)
    assert same(train_digits(tmp_path, digits), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_traced_to_its_layer(digits, tmp_path):
    steps = digits[2].steps

    def poisoned(state, sums, key, first, *rest):
        if first == 1 and (tmp_path / "metrics.jsonl").exists():  # in the second epoch
            state.params["features"]["bn_3"]["scale"] *= 3e38
        return steps(state, sums, key, first, *rest)

    with pytest.raises(InputError) as error:
        train_digits(tmp_path, digits, steps=poisoned)
    where, layer = "seed 43: the loss is nan at step 2 of epoch 2 (step 6 in all)", "features/bn_3"
    assert_traced(error, tmp_path, 5, where, layer, "a lower --learning-rate")
    with open_weights(tmp_path / "checkpoints" / "last" / "5") as source:
        assert source.read("params/features/bn_3/scale").max() > 1e38
    with pytest.raises(InputError) as again:  # it is not passed over
        train_digits(tmp_path, digits, fault=lambda *_: "output of features/bn_3")
    assert str(again.value) == str(error.value)


# In the first step, at a step in the middle, in the first of the second epoch.
@pytest.mark.slow
@pytest.mark.parametrize(("number", "done"), [(1, 0), (3, 3), (4, 4)])
def test_a_fault_that_does_not_come_again_leaves_no_trace(digits, whole, tmp_path, number, done):
    steps, calls = digits[2].steps, iter(range(1, 100))

    def failing(state, sums, key, first, last, *data):
        if next(calls) != number:
            return steps(state, sums, key, first, last, *data)
        return steps(state, sums, key, first, first, *data)._replace(is_finite=False, loss=np.inf)

    what = "first not finite: nothing when the step was taken once more"
    with pytest.raises(InputError, match=rf"the loss is inf .*\(step {done + 1} in all\); {what}"):
        train_digits(tmp_path, digits, steps=failing, fault=lambda *_: what.partition(": ")[2])
    assert same(train_digits(tmp_path, digits), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])


@contextlib.contextmanager
def started(program, settings):
    """A program that waits in the first epoch of a training, and its run directory."""
    arguments = [str(part) for pair in settings.items() for part in pair]
    out = Path(settings["--out"])
    process = subprocess.Popen(
        [sys.executable, "-c", f"{PROGRAM}\nfrom {program} import main\nmain()", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "first epoch\n" in iter(process.stdout.readline, ""), process.stderr.read()
        (run,) = out.iterdir()
        yield process, run
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_program_stops_at_a_step_and_goes_on(digits, whole, tmp_path, monkeypatch, capsys):
    settings = {"--dataset": "digits", "--model": "vgg16", "--width": CIFAR.width, "--epochs": CIFAR.epochs}
    settings |= {"--batch-size": 16, "--limit-train": 64, "--learning-rate": CIFAR.learning_rate, "--out": tmp_path}
    with started("train.cifar", settings) as (process, run):
        monkeypatch.setattr(sys, "argv", ["train.cifar", "--resume", str(run)])
        with pytest.raises(SystemExit) as refused:
            cifar.main()
        assert (refused.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate("\n")
    assert process.returncode == 143, error
    assert error.endswith(f"\ntrain.cifar: stopped by SIGTERM; go on with --resume {run}\n")
    (checkpoint,) = (run / "seed43" / "checkpoints" / "last").iterdir()
    assert checkpoint.name == "1"
    monkeypatch.setattr(train.training, "make_functions", lambda *_: digits[2])
    cifar.main()
    assert f"run: {run}" in capsys.readouterr().out
    with SeedDirectory(run / "seed43") as directory:
        assert same(directory.restore(whole[1])[:2], (whole[1], CIFAR.epochs * STEPS))
    assert lines_of(run / "seed43")[0] == lines_of(whole[0])[0]
    assert {path.name for path in run.glob("*.png")} == {"learning_curves.png", "layers.png", "alphas.png"}
    assert json.loads((run / "summary.json").read_text())["data"].startswith("digits")


# Training DPOT

DPOT_STEPS = 3  # in an epoch: nine trajectories, four at a time


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """A prepared experiment, its stage, and compiled functions."""
    file = write_fields(tmp_path_factory.mktemp("fields") / "waves.hdf5")
    config = DPOTConfig(data=str(file), resolution=8, patch_size=4, batch_size=4, epochs=2, model="mini", noise=1e-3)
    experiment = sciml.preparation.prepare(sciml.preparation.complete(config))
    config, network, data = experiment.config, experiment.network, experiment.finetune
    functions = make_dpot_functions(network, config, data, make_evaluate(network, config))
    return experiment, Stage("farms, seed 0", "farms", 0, config, data, experiment.initial(0)), functions


def train_waves(folder, waves, **changed):
    with SeedDirectory(folder) as directory:
        return train_stage(directory, waves[1], waves[2]._replace(**changed))


@pytest.fixture(scope="module")
def whole_waves(waves, tmp_path_factory):
    """A training that was never broken off."""
    folder = tmp_path_factory.mktemp("whole_waves")
    return folder, train_waves(folder, waves)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "done"), [(2, 2), (3, 3), (6, 6)])
def test_fine_tuning_stopped_at_a_step_ends_as_one_that_was_not(waves, whole_waves, tmp_path, number, done):
    with pytest.raises(Stopped):
        train_waves(tmp_path, waves, step=stopping_at(waves[2].step, number))
    assert max(int(path.name) for path in (tmp_path / "checkpoints" / "last").iterdir()) == done
    assert same(train_waves(tmp_path, waves), whole_waves[1])
    assert lines_of(tmp_path) == lines_of(whole_waves[0])


@pytest.mark.slow
def test_a_loss_of_fine_tuning_that_is_not_finite_is_traced_to_its_layer(waves, tmp_path):
    calls = iter(range(1, 100))

    def poisoned(state, *batch):
        if next(calls) == 5:
            state.params["blocks"]["0"]["norm2"]["scale"] *= 3e38
        return waves[2].step(state, *batch)

    with pytest.raises(InputError) as error:
        train_waves(tmp_path, waves, step=poisoned)
    where, layer = "farms, seed 0: the loss is nan at step 2 of epoch 2 (step 5 in all)", "blocks/0/norm2"
    advice = "a lower --learning-rate (--pretrain-rate in pretraining) or --clip"
    assert_traced(error, tmp_path, 4, where, layer, advice)
    with pytest.raises(InputError) as again:  # it is not passed over
        train_waves(tmp_path, waves, fault=lambda *_: "output of blocks/0/norm2")
    assert str(again.value) == str(error.value)


@pytest.mark.slow
def test_the_fine_tuning_program_stops_at_a_step_and_goes_on(waves, whole_waves, tmp_path, monkeypatch, capsys):
    experiment, _, functions = waves
    settings = {"--data": experiment.config.data, "--resolution": 8, "--patch-size": 4, "--batch-size": 4}
    settings |= {"--epochs": 2, "--model": "mini", "--noise": 1e-3, "--out": tmp_path}
    with started("sciml.dpot", settings) as (process, run):
        process.send_signal(signal.SIGINT)
        _, error = process.communicate("\n")
    assert process.returncode == 130, error
    assert error.endswith(f"\nsciml.dpot: stopped by SIGINT; go on with --resume {run}\n")
    (checkpoint,) = (run / "farms" / "seed0" / "checkpoints" / "last").iterdir()
    assert checkpoint.name == "1"
    monkeypatch.setattr(sciml.fine_tuning, "make_functions", lambda *_: functions)
    monkeypatch.setattr(sciml.fine_tuning, "make_evaluate", lambda *_: functions.evaluate)
    monkeypatch.setattr(sys, "argv", ["sciml.dpot", "--resume", str(run)])
    dpot.main()
    assert str(run) in capsys.readouterr().out
    with SeedDirectory(run / "farms" / "seed0") as directory:
        assert same(directory.restore(whole_waves[1])[:2], (whole_waves[1], 2 * DPOT_STEPS))
    assert lines_of(run / "farms" / "seed0")[0] == lines_of(whole_waves[0])[0]
