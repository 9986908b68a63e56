"""Checkpoints under faults: damaged files, full disks, two processes; and what in a step is not finite first."""

import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import few, same

from farms_jax.errors import InputError
from farms_jax.programs.checkpoints import Progress
from farms_jax.programs.config_file import write_config
from farms_jax.programs.exits import reported
from farms_jax.programs.finite import call, first_not_finite, recorded_call
from farms_jax.programs.run_directory import SeedDirectory, at_work
from farms_jax.weights import open_weights
from train import cifar
from train.config import Config

# Orbax leaves tasks behind when it reads a damaged checkpoint, and asyncio complains of them when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


STATE = {"params": {"dense": {"kernel": jnp.arange(12.0).reshape(4, 3)}}, "opt_state": {"count": jnp.zeros((), int)}}


def state_after(done, **partial_epoch):
    """Where a training stands after so many steps."""
    return Progress(jax.tree.map(lambda leaf: leaf + done, STATE), done, partial_epoch)


METRICS = [{"epoch": epoch, "test_accuracy": epoch / 10} for epoch in range(3)]
LAYERS = [
    {"epoch": epoch, "layer": "dense/kernel", "alpha": 2.0 + epoch, "lr_scale": 1.0, "learning_rate": 0.1}
    for epoch in range(3)
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run of one seed, three epochs of ten steps long."""
    run = tmp_path_factory.mktemp("toy") / "run"
    write_config(run, Config(), {})
    directory = SeedDirectory(run / "seed1")
    for epoch, (metrics, row) in enumerate(zip(METRICS, LAYERS, strict=True), 1):
        directory.append_layers([row])
        directory.append_metrics(metrics)
        directory.save_best(state_after(10 * epoch))
        directory.save(state_after(10 * epoch))
    return run


@pytest.fixture
def seed(toy, tmp_path):
    """Its seed's directory in a place of its own, to be damaged."""
    return shutil.copytree(toy / "seed1", tmp_path / "seed1")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = pytest.mark.parametrize("damage", few([flip, halve, Path.unlink], 3))


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
        directory = SeedDirectory(seed)
        assert same(directory.restore(STATE), state_after(20))
        assert (directory.metrics(), directory.layers()) == (METRICS[:2], LAYERS[:2])
        directory.save(state_after(30))
        assert same(directory.restore(STATE), state_after(30))
        error = capsys.readouterr().err
        named = re.fullmatch(rf"{seed / last}: damaged \((.*)\); going on from 20, the checkpoint before it\n", error)
        assert file.name == "SHA256SUMS" or named[1] == str(file)
        assert sorted(path.name for path in (seed / last).parent.iterdir()) == ["20", "30"]


def test_without_a_whole_checkpoint_a_run_does_not_go_on(seed):
    last = seed / "checkpoints" / "last"
    (last / "20" / "SHA256SUMS").unlink()
    flip(last / "30" / "default" / "_METADATA")
    message = f"no checkpoint is whole: {last}/30 (default/_METADATA); {last}/20 (SHA256SUMS); put these files back"
    directory = SeedDirectory(seed)
    with pytest.raises(InputError, match=re.escape(message)):
        directory.restore(STATE)
    assert sorted(path.name for path in last.iterdir()) == ["20", "30"]


def test_what_a_killed_process_left_half_written_is_not_there(seed):
    last = seed / "checkpoints" / "last"
    for name in ("40.part", "10.old.part", "40.part.orbax-checkpoint-tmp"):
        shutil.copytree(last / "30", last / name)
    (last / "10.old.part" / "SHA256SUMS").unlink()
    directory = SeedDirectory(seed)
    assert directory.restore(STATE).done == 30
    directory.save(state_after(35, train_loss=0.1))
    assert same(directory.restore(STATE), state_after(35, train_loss=0.1))
    assert sorted(path.name for path in last.iterdir()) == ["30", "35"]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    noise = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000, dtype=np.float32))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory = SeedDirectory(tmp_path)
    directory.save(Progress(noise, 10, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = r"last/20: cannot be written \(.*\); make room, then --resume"
        with pytest.raises(InputError, match=message) as error:
            directory.save(Progress(noise, 20, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints" / "last").iterdir()] == ["10"]
    assert same(directory.restore(noise).state, noise)
    directory.save(Progress(noise, 20, {}))
    assert directory.restore(noise).done == 20


def test_lines_are_those_of_the_checkpoint(seed):
    with (seed / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n{"epoch": 4, "los')  # of a later epoch, and killed while writing
    flip(seed / "layers.csv")
    directory = SeedDirectory(seed)
    assert directory.restore(STATE).done == 30
    assert (directory.metrics(), directory.layers()) == (METRICS, LAYERS)


def test_lines_without_a_checkpoint_are_dropped(tmp_path):
    directory = SeedDirectory(tmp_path)
    directory.append_layers(LAYERS)
    directory.append_metrics(METRICS[0])
    assert directory.restore(STATE) == (STATE, 0, {})
    assert directory.metrics() == directory.layers() == []


def test_a_checkpoint_of_other_settings_is_refused(toy):
    directory = SeedDirectory(toy / "seed1")
    with pytest.raises(InputError, match="30 is not of these settings") as error:
        directory.restore({**STATE, "params": {"dense": {"kernel": jnp.zeros((4, 4))}}})
    assert "\n" not in str(error.value)


@DAMAGE
def test_a_damaged_best_checkpoint_is_named_where_it_is_read(toy, tmp_path, damage):
    best = Path("seed1", "checkpoints", "best", "30")
    places = Path(), best.parent, best  # what may be opened
    for place in places:
        with open_weights(toy / place) as source:
            kernel = source.read("params/dense/kernel")
        np.testing.assert_array_equal(kernel, STATE["params"]["dense"]["kernel"] + 30)
    for number, file in enumerate(file for file in files_of(toy / best) if file.name != "SHA256SUMS"):
        run = shutil.copytree(toy, tmp_path / str(number))
        damage(run / best / file)
        with pytest.raises(InputError, match=f"^{run / best / file}: missing or damaged") as error:
            open_weights(run / places[number % 3])
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
    outputs = []
    recorded_call(outputs, Toy(2.0, 3.0, 5.0), jnp.ones(2))
    assert [(name, float(output[0])) for name, output in outputs] == [
        ("z_first", 2),
        ("a_second", 6),
        ("blocks/0", 30),
        ("", 30),
    ]
    assert Scale.__call__ is before
    with pytest.raises(TypeError):
        recorded_call([], Toy(2.0, 3.0), None)
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
