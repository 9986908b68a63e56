"""Training under faults: stops in the middle of an epoch, losses that are not finite.

Two networks are trained: one for images by `train.training`, DPOT by `sciml.training`. Each is compiled once.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from dpot_helpers import write_fields
from helpers import few, lines_of, same

import sciml.model
import sciml.preparation
import sciml.training
import train.training
from farms_jax.errors import InputError
from farms_jax.programs.run_directory import SeedDirectory
from farms_jax.programs.stopping import Stopped
from farms_jax.weights import open_weights
from sciml import dpot
from sciml.config import Config as DPOTConfig
from sciml.steps import make_evaluate
from sciml.training import Stage, make_functions as make_dpot_functions, train_stage
from train import cifar, vgg
from train.config import Config, resolve
from train.data import load
from train.training import make_functions, train_seed

EPOCHS = 2


class Training(NamedTuple):
    """A training, and what the messages and files of its faults are."""

    train: Callable[..., Any]  # (directory, functions) -> final state
    functions: Any  # compiled
    step: str  # name of the function that takes one or more steps
    steps: int  # of an epoch
    done: dict[int, int]  # finished steps after a stop in a call of that number
    name: str
    layer: str  # whose scale is made too large
    advice: str
    # The program: its settings, what of it is put in place of what it would compile again, where it writes.
    main: Callable[[], None]
    settings: dict[str, Any]
    patches: list[tuple[Any, str, Any]]
    folder: str
    stop: signal.Signals

    def run(self, folder, **changed):
        """Train in a folder, with some of the functions changed."""
        directory = SeedDirectory(folder)
        return self.train(directory, self.functions._replace(**changed))


def train_images(_):
    settings = {"--dataset": "digits", "--model": "vgg16", "--width": 0.0625, "--epochs": EPOCHS, "--batch-size": 16}
    settings |= {"--limit-train": 64, "--learning-rate": 0.02}
    fields = {name[2:].replace("-", "_"): value for name, value in settings.items()}
    images, config = load("digits", limit_train=64), resolve(Config(**fields), small=True)
    compiled = make_functions(config, images)

    def steps(state, *rest):
        # As a restored state is; otherwise the steps would compile for both kinds.
        return compiled.steps(jax.device_put(state, jax.devices()[0]), *rest)

    functions = compiled._replace(steps=steps)
    return Training(
        train=lambda directory, functions: train_seed(directory, 43, config, images, functions),
        functions=functions,
        step="steps",
        steps=4,
        done={2: 3, 3: 4, 6: 8},  # the calls of an epoch take 1, 2 and 1 steps
        name="seed 43",
        layer="features/bn_3",
        advice="a lower --learning-rate",
        main=cifar.main,
        settings=settings,
        patches=[(train.training, "make_functions", lambda *_: functions)],
        folder="seed43",
        stop=signal.SIGTERM,
    )


def train_flows(folder):
    settings = {"--data": write_fields(folder / "waves.hdf5"), "--resolution": 8, "--patch-size": 4, "--batch-size": 4}
    settings |= {"--epochs": EPOCHS, "--model": "mini", "--noise": 1e-3}
    fields = {name[2:].replace("-", "_"): value for name, value in settings.items()}
    config = DPOTConfig(**fields | {"data": str(fields["data"])})
    experiment = sciml.preparation.prepare(sciml.preparation.complete(config))
    config, network, data = experiment.config, experiment.network, experiment.finetune
    functions = make_dpot_functions(network, config, data, make_evaluate(network, config))
    stage = Stage("farms, seed 0", "farms", 0, config, data, experiment.initial(0))
    return Training(
        train=lambda directory, functions: train_stage(directory, stage, functions),
        functions=functions,
        step="step",
        steps=3,  # nine trajectories, four at a time
        done={2: 2, 3: 3, 6: 6},
        name="farms, seed 0",
        layer="blocks/0/norm2",
        advice="a lower --learning-rate (--pretrain-rate in pretraining) or --clip",
        main=dpot.main,
        settings=settings,
        patches=[
            (sciml.training, "make_functions", lambda *_: functions),
            (sciml.training, "make_evaluate", lambda *_: functions.evaluate),
        ],
        folder="farms/seed0",
        stop=signal.SIGINT,
    )


FLOWS = pytest.param(train_flows, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[train_images, FLOWS])
def training(request, tmp_path_factory):
    """Networks with fewer layers than the programs have: compiling takes most of the time here."""
    mini = sciml.model.ModelConfig(width=16, depth=1, num_blocks=2, modes=2, out_width=8, num_classes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.training, "_PIECE_SECONDS", 1e9)  # calls take 1, 2, 4, ... steps, however slow
        patch.setattr(vgg, "CONVOLUTIONS", {16: (1, 1, 1, 1, 1)})
        patch.setitem(sciml.model.NAMED, "mini", mini)
        yield request.param(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def compiled_so_far():
    """Free nothing in between: what the tests share would be compiled again."""


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory):
    """Folder and final state of a training that was never broken off."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, training.run(folder)


def at_call(number, function, act):
    """The function, but `act` is called first, with the same arguments, in its call of that number."""
    calls = iter(range(1, 1000))

    def called(*arguments):
        if next(calls) == number:
            act(*arguments)
        return function(*arguments)

    return called


# In an epoch; at its last step, after which its test and lines come first; at the last step of all.
@pytest.mark.parametrize("number", few([2, 3, 6], 3))
def test_training_stopped_at_a_step_ends_as_one_that_was_not(training, whole, tmp_path, number):
    step = getattr(training.functions, training.step)
    with pytest.raises(Stopped):
        stopping = at_call(number, step, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        training.run(tmp_path, **{training.step: stopping})
    done, last = training.done[number], tmp_path / "checkpoints" / "last"
    assert max(int(path.name) for path in last.iterdir()) == done
    assert (last / str(done) / "partial_epoch.json").is_file() == (done % training.steps > 0)
    assert same(training.run(tmp_path), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_traced_to_its_layer(training, tmp_path):
    def poison(state, *_):
        parts = state.params
        for name in training.layer.split("/"):
            parts = parts[name]
        parts["scale"] *= 3e38

    poisoned = at_call(5, getattr(training.functions, training.step), poison)  # the second step of the second epoch
    with pytest.raises(InputError) as error:
        training.run(tmp_path, **{training.step: poisoned})
    done, found = training.steps + 1, f"output of {training.layer}"
    kept = tmp_path / "checkpoints" / "last" / str(done)
    assert str(error.value) == (
        f"{training.name}: the loss is nan at step 2 of epoch 2 (step {done + 1} in all); first not finite: {found}; "
        f"the state before that step is kept in {kept}; --resume takes the step again, and if it ends the same, start "
        f"anew with {training.advice}"
    )
    with open_weights(kept) as source:
        assert all(np.isfinite(source.read(name)).all() for name in source.tensors)
        assert source.read(f"params/{training.layer}/scale").max() > 1e38
    assert [line["epoch"] for line in lines_of(tmp_path)[0]] == [0]
    with pytest.raises(InputError) as again:  # it is not passed over
        training.run(tmp_path, fault=lambda *_: found)
    assert str(again.value) == str(error.value)


# In the first step, at a step in the middle, in the first of the second epoch.
@pytest.mark.slow
@pytest.mark.parametrize("training", [train_images], indirect=True)
@pytest.mark.parametrize(("number", "done"), [(1, 0), (3, 3), (4, 4)])
def test_a_fault_that_does_not_come_again_leaves_no_trace(training, whole, tmp_path, number, done):
    steps, calls = training.functions.steps, iter(range(1, 100))

    def failing(state, sums, key, first, last, *data):
        if next(calls) != number:
            return steps(state, sums, key, first, last, *data)
        return steps(state, sums, key, first, first, *data)._replace(is_finite=False, loss=np.inf)

    what = "nothing when the step was taken once more"
    with pytest.raises(InputError, match=rf"the loss is inf .*\(step {done + 1} in all\); first not finite: {what}"):
        training.run(tmp_path, steps=failing, fault=lambda *_: what)
    assert same(training.run(tmp_path), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])


@pytest.mark.slow
def test_the_program_stops_at_a_step_and_goes_on(training, whole, tmp_path, monkeypatch, capsys):
    for place, name, value in training.patches:
        monkeypatch.setattr(place, name, value)
    arguments = [str(part) for pair in training.settings.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["program", *arguments, "--out", str(tmp_path)])
    append = SeedDirectory.append_layers
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:  # in the first epoch
        stopping = at_call(1, append, lambda *_: os.kill(os.getpid(), training.stop))
        patch.setattr(SeedDirectory, "append_layers", lambda *arguments: stopping(*arguments))
        training.main()
    assert ended.value.code == 128 + training.stop
    (run,) = tmp_path.iterdir()
    message = f"stopped by {training.stop.name}; go on with --resume {run}\n"
    assert capsys.readouterr().err.endswith(message)
    (checkpoint,) = (run / training.folder / "checkpoints" / "last").iterdir()
    assert checkpoint.name == "1"
    monkeypatch.setattr(sys, "argv", ["program", "--resume", str(run)])
    training.main()
    assert f"run: {run}" in capsys.readouterr().out
    directory = SeedDirectory(run / training.folder)
    assert same(directory.restore(whole[1])[:2], (whole[1], EPOCHS * training.steps))
    assert lines_of(run / training.folder)[0] == lines_of(whole[0])[0]
    assert (run / "alphas.png").is_file() and (run / "summary.json").is_file()
