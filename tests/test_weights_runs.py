"""Run directories open at their best checkpoint, and their checkpoints are found in the order they were written."""

import json
import os

import numpy as np
import pytest
from weights_helpers import arrays, write, write_orbax

from farms_jax.errors import InputError
from farms_jax.programs.checkpoints import Progress
from farms_jax.programs.run_directory import SeedDirectory
from farms_jax.weights import checkpoints, open_weights


def state(value):
    return {
        "params": {"dense": {"kernel": np.full((4, 3), value, np.float32)}},
        "opt_state": {"0": {"trace": np.ones(3)}},
    }


def train(seed_folder, *, best, last):
    """Epochs, the best of which has the number `best`; 0 for none."""
    directory = SeedDirectory(seed_folder)
    for epoch in range(1, last + 1):
        if epoch <= best:
            directory.save_best(Progress(state(epoch), epoch, {}))
        directory.save(Progress(state(epoch), epoch, {}))


def run_of(folder, seeds, *, best=1, last=2):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"config": {}}))
    for seed in seeds:
        train(folder / seed, best=best, last=last)
    return folder


def kernel(source):
    return source.read("params/dense/kernel").max()


@pytest.mark.parametrize(
    ("seeds", "best", "opened", "value"),
    [
        (("seed43", "seed7"), 1, "seed7/checkpoints/best/1", 1),
        (("none/seed1", "farms/seed2", "farms/seed10"), 1, "farms/seed2/checkpoints/best/1", 1),
        (("pretrain",), 1, "pretrain/checkpoints/best/1", 1),
        (("seed1",), 0, "seed1/checkpoints/last/2", 2),  # without a best
    ],
)
def test_a_run_opens_at_the_best_of_its_first_seed(tmp_path, seeds, best, opened, value):
    with open_weights(run_of(tmp_path / "digits", seeds, best=best)) as source:
        assert source.name == f"digits, {opened}"
        assert kernel(source) == value
        assert set(source.skipped) == {"opt_state/0/trace"}


@pytest.mark.parametrize(
    ("inside", "value"),
    [
        ("seed7", 1),
        ("seed7/checkpoints/last", 2),
        ("seed7/checkpoints/last/2", 2),
        ("seed7/checkpoints/best/1/default", 1),
    ],
)
def test_any_part_of_a_run_opens_by_itself(tmp_path, inside, value):
    with open_weights(run_of(tmp_path / "digits", ["seed43", "seed7"]) / inside) as source:
        assert kernel(source) == value


def test_a_run_of_prune_opens_at_its_model(tmp_path):
    (model := tmp_path / "pruned" / "model").mkdir(parents=True)
    write("safetensors", model, arrays("."))
    (tmp_path / "pruned" / "run.json").write_text("{}")
    with open_weights(tmp_path / "pruned") as source:
        assert (source.name, list(source.tensors)) == ("pruned, pruned model", list(arrays(".")))
    model.rename(tmp_path / "pruned" / "model.part")
    with pytest.raises(InputError, match="pruned: a run of prune whose model is not finished"):
        open_weights(tmp_path / "pruned")


def test_a_run_that_has_just_begun_and_a_folder_of_runs(tmp_path):
    run_of(tmp_path / "digits", ["seed1"], last=0)
    with pytest.raises(InputError, match="digits: a run without a checkpoint yet; wait"):
        open_weights(tmp_path / "digits")
    with pytest.raises(InputError, match="there are no weights in it .digits"):
        open_weights(tmp_path)


def stamp(paths):
    """Give files and folders times in their order."""
    for seconds, path in enumerate(paths, start=1):
        os.utime(path, (seconds, seconds))


def test_checkpoints_of_a_run_are_listed_oldest_first(tmp_path):
    run = run_of(tmp_path / "digits", ["seed1", "seed2"])
    (run / "seed1" / "checkpoints" / "last" / "4.orbax-checkpoint-tmp").mkdir()
    expected = [run / seed / "checkpoints" / "last" / step for seed in ("seed2", "seed1") for step in ("1", "2")]
    stamp(expected)
    assert checkpoints(run) == expected


def test_checkpoints_of_other_programs_are_listed(tmp_path):
    expected = [tmp_path / "checkpoint-2" / "model.safetensors", tmp_path / "checkpoint-10" / "model.safetensors"]
    for path in expected:
        path.parent.mkdir()
        write("safetensors", path.parent, arrays())
        (path.parent / "masks.safetensors").write_bytes(path.read_bytes())
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "net.safetensors.index.json").write_text("{}")
    (tmp_path / "sharded" / "net-1-of-1.safetensors").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    expected += [tmp_path / "sharded", tmp_path / "adapter", write("npz", tmp_path, arrays())]
    expected.append(write_orbax("orbax", tmp_path / "final", arrays()))
    (tmp_path / "model.npz.part").touch()
    (tmp_path / ".hidden").mkdir()
    write("npz", tmp_path / ".hidden", arrays())
    (tmp_path / "again").symlink_to(tmp_path)
    stamp(expected)
    assert checkpoints(tmp_path) == expected
    for path in expected[:2] + expected[4:]:
        assert open_weights(path).tensors


def test_checkpoints_need_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        checkpoints(tmp_path / "digits")
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_that_is_removed_meanwhile_is_not_listed(tmp_path):
    (tmp_path / "gone.npz").symlink_to(tmp_path / "nothing")
    path = write("npz", tmp_path, arrays())
    assert checkpoints(tmp_path) == [path]
