"""Training under faults: damaged checkpoints, stops in the middle of an epoch, losses that are not finite."""

import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpot_helpers import write_fields
from flax import nnx

import sciml.fine_tuning
import sciml.model
import sciml.preparation
import train.training
from farms_jax.errors import InputError
from farms_jax.programs.checkpoints import Progress
from farms_jax.programs.config_file import write_config
from farms_jax.programs.exits import reported
from farms_jax.programs.finite import Recorder, call, first_not_finite
from farms_jax.programs.run_directory import SeedDirectory, at_work
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
FEWER_LAYERS = f"""
import sciml.model, train.vgg
from sciml.model import ModelConfig
train.vgg.CONVOLUTIONS = {CONVOLUTIONS}
sciml.model.NAMED["mini"] = {MINI}
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


# Checkpoints

STATE = {"params": {"dense": {"kernel": jnp.arange(12.0).reshape(4, 3)}}, "opt_state": {"count": jnp.zeros((), int)}}


def state_after(done, **partial_epoch):
    """Where a training stands after so many steps."""
    return Progress(jax.tree.map(lambda leaf: leaf + done, STATE), done, partial_epoch)


def line_of(epoch):
    row = {"epoch": epoch, "layer": "dense/kernel", "alpha": 2.0 + epoch, "lr_scale": 1.0, "learning_rate": 0.1}
    return {"epoch": epoch, "test_accuracy": epoch / 10}, [row]


def train_toy(folder, epochs):
    with SeedDirectory(folder) as directory:
        for epoch in range(epochs):
            metrics, layers = line_of(epoch)
            directory.append_layers(layers)
            directory.append_metrics(metrics)
            directory.save_best(state_after(10 * (epoch + 1)))
            directory.save(state_after(10 * (epoch + 1)))
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run of one seed, three epochs of ten steps long."""
    run = tmp_path_factory.mktemp("toy") / "run"
    write_config(run, Config(), {})
    train_toy(run / "seed1", 3)
    return run


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGE = pytest.mark.parametrize("damage", [flip, halve, empty, Path.unlink])


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


@DAMAGE
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(toy, tmp_path, damage, capsys):
    last = Path("checkpoints", "last", "30")
    files = files_of(toy / "seed1" / last)
    assert {"SHA256SUMS", "metrics.jsonl", "layers.csv", "_METADATA"} < {file.name for file in files}
    for number, file in enumerate(files):
        seed = shutil.copytree(toy / "seed1", tmp_path / str(number))
        damage(seed / last / file)
        with SeedDirectory(seed) as directory:
            assert same(directory.restore(STATE), state_after(20))
            assert [line["epoch"] for line in directory.metrics()] == [0, 1]
            assert [row["epoch"] for row in directory.layers()] == [0, 1]
            directory.save(state_after(30))
            assert same(directory.restore(STATE), state_after(30))
        error = capsys.readouterr().err
        named = re.fullmatch(rf"{seed / last}: damaged \((.*)\); going on from 20, the checkpoint before it\n", error)
        assert file.name == "SHA256SUMS" or named[1] == str(file)
        assert sorted(path.name for path in (seed / last).parent.iterdir()) == ["20", "30"]


def test_without_a_whole_checkpoint_a_run_does_not_go_on(toy, tmp_path):
    seed = shutil.copytree(toy / "seed1", tmp_path / "seed1")
    last = seed / "checkpoints" / "last"
    (last / "20" / "SHA256SUMS").unlink()
    flip(last / "30" / "default" / "_METADATA")
    message = f"no checkpoint is whole: {last}/30 (default/_METADATA); {last}/20 (SHA256SUMS); put these files back"
    with SeedDirectory(seed) as directory, pytest.raises(InputError, match=re.escape(message)):
        directory.restore(STATE)
    assert sorted(path.name for path in last.iterdir()) == ["20", "30"]


def test_what_a_killed_process_left_half_written_is_not_there(toy, tmp_path):
    seed = shutil.copytree(toy / "seed1", tmp_path / "seed1")
    last = seed / "checkpoints" / "last"
    for name in ("40.part", "10.old.part", "40.part.orbax-checkpoint-tmp"):
        shutil.copytree(last / "30", last / name)
    (last / "10.old.part" / "SHA256SUMS").unlink()
    with SeedDirectory(seed) as directory:
        assert directory.restore(STATE).done == 30
        directory.save(state_after(35, train_loss=0.1))
        assert same(directory.restore(STATE), state_after(35, train_loss=0.1))
    assert sorted(path.name for path in last.iterdir()) == ["30", "35"]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    noise = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000, dtype=np.float32))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SeedDirectory(tmp_path) as directory:
        directory.save(Progress(noise, 10, {}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(
                InputError, match=r"last/20: cannot be written \(.*\); make room, then --resume"
            ) as error:
                directory.save(Progress(noise, 20, {}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert [path.name for path in (tmp_path / "checkpoints" / "last").iterdir()] == ["10"]
        assert same(directory.restore(noise).state, noise)
        directory.save(Progress(noise, 20, {}))
        assert directory.restore(noise).done == 20


def test_lines_are_those_of_the_checkpoint(toy, tmp_path):
    seed = shutil.copytree(toy / "seed1", tmp_path / "seed1")
    with (seed / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n{"epoch": 4, "los')  # of a later epoch, and killed while writing
    flip(seed / "layers.csv")
    with SeedDirectory(seed) as directory:
        assert directory.restore(STATE).done == 30
        assert directory.metrics() == [line_of(epoch)[0] for epoch in range(3)]
        assert directory.layers() == [line_of(epoch)[1][0] for epoch in range(3)]


def test_lines_without_a_checkpoint_are_dropped(tmp_path):
    with SeedDirectory(tmp_path) as directory:
        directory.append_layers(line_of(0)[1])
        directory.append_metrics(line_of(0)[0])
        assert directory.restore(STATE) == (STATE, 0, {})
        assert directory.metrics() == directory.layers() == []


def test_a_checkpoint_of_other_settings_is_refused(toy):
    with (
        SeedDirectory(toy / "seed1") as directory,
        pytest.raises(InputError, match="30 is not of these settings") as error,
    ):
        directory.restore({**STATE, "params": {"dense": {"kernel": jnp.zeros((4, 4))}}})
    assert "\n" not in str(error.value)


@DAMAGE
@pytest.mark.parametrize("inside", [".", "seed1/checkpoints/best", "seed1/checkpoints/best/30"])
def test_a_damaged_best_checkpoint_is_named_where_it_is_read(toy, tmp_path, damage, inside):
    best = toy / "seed1" / "checkpoints" / "best" / "30"
    with open_weights(toy / inside) as source:
        np.testing.assert_array_equal(
            source.read("params/dense/kernel"), state_after(30).state["params"]["dense"]["kernel"]
        )
    for number, file in enumerate(file for file in files_of(best) if file.name != "SHA256SUMS"):
        run = shutil.copytree(toy, tmp_path / str(number))
        path = run / best.relative_to(toy) / file
        damage(path)
        with pytest.raises(InputError, match=f"^{path}: missing or damaged") as error:
            open_weights(run / inside)
        assert "\n" not in str(error.value)


# One process in a run directory, and what it says when it is stopped


def test_a_run_at_work_is_refused(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.cifar", "--resume", str(toy)])
    with at_work(toy), pytest.raises(SystemExit) as ended:
        cifar.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"train.cifar: {toy}: another process is at work there; wait until")


def test_a_stop_says_how_to_go_on(tmp_path, capsys):
    run = tmp_path / "of two words"
    with pytest.raises(SystemExit) as ended, reported("prog"), at_work(run):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert capsys.readouterr().err == f"\nprog: stopped by SIGTERM; go on with --resume '{run}'\n"
    with at_work(run):  # it was let go
        pass


# What is not finite first


class Scale(nnx.Module):
    def __init__(self, by):
        self.by = nnx.Param(jnp.full(2, by))

    def __call__(self, x):
        return self.by[...] * x


class Toy(nnx.Module):
    """`z_first` runs before `a_second`, against the order of their names; and `blocks` after them."""

    def __init__(self, first, second, *blocks):
        self.z_first, self.a_second = Scale(first), Scale(second)
        self.blocks = nnx.List([Scale(by) for by in blocks])

    def __call__(self, x):
        x = self.a_second(self.z_first(x))
        for block in self.blocks:
            x = block(x)
        return x


def test_modules_are_recorded_in_the_order_of_their_calls():
    before = Scale.__call__
    recorder = Recorder()
    recorder(Toy(2.0, 3.0, 5.0), jnp.ones(2))
    assert [(name, float(output[0])) for name, output in recorder.outputs] == [
        ("z_first", 2),
        ("a_second", 6),
        ("blocks/0", 30),
        ("", 30),
    ]
    assert Scale.__call__ is before
    with pytest.raises(TypeError):
        recorder(Toy(2.0, 3.0), None)
    assert Scale.__call__ is before


@pytest.mark.parametrize(
    ("factors", "found"),
    [
        ((1.0, np.nan, np.nan), "weight a_second/by"),
        ((1e20, 1e20, np.inf), "weight blocks/0/by"),
        ((1e20, 1e20, 1.0), "output of a_second"),
        ((1.0, 1e20, 1e20, 1e20), "output of blocks/0"),
        ((3e38, 1.0), "the loss itself, of finite outputs"),
        # Those of z_first/by and of a_second/by are 1e20, whose square is not finite.
        ((1e-10, 1e-10, 1e15, 1e15), "gradient of a_second/by"),
        ((1.0, 1.0), "nothing when the step was taken once more"),
    ],
)
def test_the_first_that_is_not_finite_is_found(factors, found):
    graph, params = nnx.split(Toy(*factors))

    def loss_of(params, x, *, call=call):
        return call(nnx.merge(graph, params), x).sum()

    assert first_not_finite(loss_of, params, jnp.ones(2)) == found


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


# The calls of an epoch take 1, 2 and 1 steps. After the last step the epoch's test and lines come first.
@pytest.mark.parametrize(("number", "done"), [(1, 1), (2, 3), (3, 4), (4, 5), (6, 8)])
def test_training_stopped_at_a_step_ends_as_one_that_was_not(digits, whole, tmp_path, number, done, capsys):
    with pytest.raises(Stopped):
        train_digits(tmp_path, digits, steps=stopping_at(digits[2].steps, number))
    checkpoints = sorted(int(path.name) for path in (tmp_path / "checkpoints" / "last").iterdir())
    assert checkpoints[-1] == done
    assert (tmp_path / "checkpoints" / "last" / str(done) / "partial_epoch.json").is_file() == (done % STEPS > 0)
    assert same(train_digits(tmp_path, digits), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])


def test_a_loss_that_is_not_finite_is_traced_to_its_layer(digits, tmp_path):
    steps = digits[2].steps

    def poisoned(state, sums, key, first, *rest):
        if first == 1 and (tmp_path / "metrics.jsonl").exists():  # in the second epoch
            state.params["features"]["bn_3"]["scale"] *= 3e38
        return steps(state, sums, key, first, *rest)

    with pytest.raises(InputError) as error:
        train_digits(tmp_path, digits, steps=poisoned)
    kept = tmp_path / "checkpoints" / "last" / "5"
    assert str(error.value) == (
        "seed 43: the loss is nan at step 2 of epoch 2 (step 6 in all); first not finite: output of features/bn_3; the "
        f"state before that step is kept in {kept}; --resume takes the step again, and if it ends the same, start anew "
        "with a lower --learning-rate"
    )
    with open_weights(kept) as source:
        assert source.read("params/features/bn_3/scale").max() > 1e38
        assert all(np.isfinite(source.read(name)).all() for name in source.tensors)
    with pytest.raises(InputError) as again:  # it is not passed over
        train_digits(tmp_path, digits, fault=lambda *_: "output of features/bn_3")
    assert str(again.value) == str(error.value)
    assert [line["epoch"] for line in lines_of(tmp_path)[0]] == [0]


# In the first step, at a step in the middle, in the first of the second epoch.
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
def started(program, settings, layers):
    """A program in the first epoch of a training, and its run directory."""
    arguments = [str(part) for pair in settings.items() for part in pair]
    out = Path(settings["--out"])
    process = subprocess.Popen(
        [sys.executable, "-c", f"{FEWER_LAYERS}\nfrom {program} import main\nmain()", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not any(out.glob(layers)):
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        (run,) = out.iterdir()
        yield process, run
    finally:
        process.kill()
        process.communicate()


def test_the_program_stops_at_a_step_and_goes_on(digits, whole, tmp_path, monkeypatch, capsys):
    settings = {"--dataset": "digits", "--model": "vgg16", "--width": CIFAR.width, "--epochs": CIFAR.epochs}
    settings |= {"--batch-size": 16, "--limit-train": 64, "--learning-rate": CIFAR.learning_rate, "--out": tmp_path}
    with started("train.cifar", settings, "*/seed43/layers.csv") as (process, run):
        monkeypatch.setattr(sys, "argv", ["train.cifar", "--resume", str(run)])
        with pytest.raises(SystemExit) as refused:
            cifar.main()
        assert (refused.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert error.endswith(f"\ntrain.cifar: stopped by SIGTERM; go on with --resume {run}\n")
    (checkpoint,) = (run / "seed43" / "checkpoints" / "last").iterdir()
    assert 0 < int(checkpoint.name) < STEPS
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


@pytest.mark.parametrize(("number", "done"), [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6)])
def test_fine_tuning_stopped_at_a_step_ends_as_one_that_was_not(waves, whole_waves, tmp_path, number, done):
    with pytest.raises(Stopped):
        train_waves(tmp_path, waves, step=stopping_at(waves[2].step, number))
    assert max(int(path.name) for path in (tmp_path / "checkpoints" / "last").iterdir()) == done
    assert same(train_waves(tmp_path, waves), whole_waves[1])
    assert lines_of(tmp_path) == lines_of(whole_waves[0])


def test_a_loss_of_fine_tuning_that_is_not_finite_is_traced_to_its_layer(waves, tmp_path):
    calls = iter(range(1, 100))

    def poisoned(state, *batch):
        if next(calls) == 5:
            state.params["blocks"]["0"]["norm2"]["scale"] *= 3e38
        return waves[2].step(state, *batch)

    with pytest.raises(InputError) as error:
        train_waves(tmp_path, waves, step=poisoned)
    kept = tmp_path / "checkpoints" / "last" / "4"
    assert str(error.value) == (
        "farms, seed 0: the loss is nan at step 2 of epoch 2 (step 5 in all); first not finite: output of "
        f"blocks/0/norm2; the state before that step is kept in {kept}; --resume takes the step again, and if it ends "
        "the same, start anew with a lower --learning-rate (--pretrain-rate in pretraining) or --clip"
    )
    with open_weights(kept) as source:
        assert all(np.isfinite(source.read(name)).all() for name in source.tensors)
    with pytest.raises(InputError) as again:  # it is not passed over
        train_waves(tmp_path, waves, fault=lambda *_: "output of blocks/0/norm2")
    assert str(again.value) == str(error.value)
    assert [line["epoch"] for line in lines_of(tmp_path)[0]] == [0]


def test_the_fine_tuning_program_stops_at_a_step_and_goes_on(waves, whole_waves, tmp_path, monkeypatch, capsys):
    experiment, _, functions = waves
    settings = {"--data": experiment.config.data, "--resolution": 8, "--patch-size": 4, "--batch-size": 4}
    settings |= {"--epochs": 2, "--model": "mini", "--noise": 1e-3, "--out": tmp_path}
    with started("sciml.dpot", settings, "*/farms/seed0/layers.csv") as (process, run):
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert error.endswith(f"\nsciml.dpot: stopped by SIGINT; go on with --resume {run}\n")
    (checkpoint,) = (run / "farms" / "seed0" / "checkpoints" / "last").iterdir()
    assert 0 < int(checkpoint.name) < DPOT_STEPS
    monkeypatch.setattr(sciml.fine_tuning, "make_functions", lambda *_: functions)
    monkeypatch.setattr(sciml.fine_tuning, "make_evaluate", lambda *_: functions.evaluate)
    monkeypatch.setattr(sys, "argv", ["sciml.dpot", "--resume", str(run)])
    dpot.main()
    assert str(run) in capsys.readouterr().out
    with SeedDirectory(run / "farms" / "seed0") as directory:
        assert same(directory.restore(whole_waves[1])[:2], (whole_waves[1], 2 * DPOT_STEPS))
    assert lines_of(run / "farms" / "seed0")[0] == lines_of(whole_waves[0])[0]
