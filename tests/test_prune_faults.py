"""Wrong input and a full disk: one clear error, before long work, and nothing is damaged."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import few
from prune_helpers import DATA, bytes_of, command, small_run, weights_of, write_folder

import farms_jax.programs.cache
import prune.output
import prune.perplexity
import prune.pruning
import prune.record
import prune.run
import prune.scores
from farms_jax.errors import InputError
from prune.job import prepare
from prune.run import run

ROOT = DATA.parent.parent
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


def remove_a_shard(folder, tensors):
    write_folder(folder, tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_the_file(folder, tensors):
    write_folder(folder, tensors)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def leave_a_tensor_out(folder, tensors):
    del tensors[UP]
    write_folder(folder, tensors)


def put_a_wrong_shape(folder, tensors):
    write_folder(folder, tensors | {UP: np.ascontiguousarray(tensors[UP].T)})


def put_nan_and_inf(folder, tensors):
    for name, value in ((UP, np.nan), ("model.norm.weight", -np.inf)):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = value
    write_folder(folder, tensors, shards=2)


def make_another_family(folder, tensors):
    write_folder(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, r"model-00002-of-00003\.safetensors: this shard is missing.* download it again"),
        (cut_the_file, r"model\.safetensors: .*truncated.*; download it again"),
        (leave_a_tensor_out, rf"(?s)1 tensor\(s\) do not fit.* missing: {UP} \[256, 96\]$"),
        (put_a_wrong_shape, rf"(?s)1 tensor\(s\) do not fit.* {UP} is \[96, 256\], must be \[256, 96\]$"),
        (put_nan_and_inf, rf"source: NaN or Inf in {UP}, model\.norm\.weight; the checkpoint is damaged, get it again"),
        (make_another_family, r"`model_type` must be one of llama, .*opt, got 'gpt_neox'$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("no_long_work")
def test_a_model_that_cannot_be_used_is_refused(damage, message, tmp_path):
    source = tmp_path / "source"
    damage(source, dict(weights_of("llama_tiny")))
    before = bytes_of(source)
    assert_refused(small_run(tmp_path, source, allocation="uniform"), message)
    assert bytes_of(source) == before


# --- Settings and texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.2}, r"^--sparsity must be in \[0, 1\), the fraction to remove; got 1\.2$"),
        ({"sparsity": float("nan")}, r"^--sparsity .*got nan$"),
        ({"groups": "3:2"}, r"^--groups must read N:M with 0 < N < M, such as 2:4; got '3:2'$"),
        ({"groups": "x"}, r"^--groups .*got 'x'$"),
        (
            {"groups": "2:7"},
            r"^--groups 2:7: the 96 inputs of model\.layers\.0\.self_attn\.q_proj are no multiple of 7",
        ),
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
        ({"calibration": "no/such.npy"}, r"^--calibration no/such\.npy: no such file"),
        ({"tokenizer": "no/such folder"}, r"^--tokenizer no/such folder: no such folder"),
        ({"model": "no such model"}, r"^--model no such model: no such folder"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_long_work")
def test_settings_that_cannot_be_met_are_refused(changes, message, tmp_path):
    assert_refused(dataclasses.replace(small_run(tmp_path), **changes), message)


@pytest.mark.usefixtures("no_long_work")
def test_an_output_that_is_no_folder_is_refused(tmp_path):
    config = small_run(tmp_path)
    config.out.write_text("a file")
    for fresh in (False, True):
        assert_refused(dataclasses.replace(config, fresh=fresh), r"^--out: cannot make .*; name another folder")
    assert config.out.read_text() == "a file"


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
    config = small_run(tmp_path, sparsity=1.2)
    found = subprocess.run(command(config), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "prune.llama: --sparsity must be in [0, 1), the fraction to remove; got 1.2\n"


# --- No space left on disk -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of a run that nothing stopped."""
    config = small_run(tmp_path_factory.mktemp("whole"))
    job = prepare(config)
    run(job)
    return config, bytes_of(job.path / "model")


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


def test_no_space_under_a_real_limit(tmp_path):
    """The system refuses files of more than a megabyte."""
    config = small_run(tmp_path)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); import sys; {MAIN}"
    program = [sys.executable, "-c", limited, *command(config)[3:]]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert "model.part: cannot write 2 MiB (File too large); free space, or name another --out" in found.stderr
    assert not list(config.out.rglob("model*"))


MAIN = "from prune.llama import main; main()"
# 3 calls for the tensors outside the blocks, then 2 for each block, its weights and its masks.
PLACES = {
    "weights of block 1": (prune.output.os, "fsync", 6),
    "masks of block 2": (prune.output.os, "fsync", 9),
    "record": (prune.record, "write_json", 20),
    "cache": (farms_jax.programs.cache, "write_json", 3),
    "card": (prune.run, "write_json", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", few(PLACES, 6))
def test_no_space_on_the_way_keeps_what_is_done(place, whole, tmp_path, monkeypatch):
    module, name, number = PLACES[place]
    source = bytes_of(DATA / "llama_tiny")
    config = dataclasses.replace(whole[0], out=tmp_path / "out")
    pruned = []
    prune_block = prune.pruning.prune_block
    monkeypatch.setattr(prune.pruning, "prune_block", lambda *a: pruned.append(a[1]) or prune_block(*a))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_at(getattr(module, name), number))
        with pytest.raises(InputError, match=r"No space left on device.*free space.* the same command"):
            run(prepare(config))
    assert not (prepare(config).path / "run.json").exists()
    run(prepare(config))
    assert bytes_of(prepare(config).path / "model") == whole[1]
    # No block was done twice but the one that was being written.
    assert len(pruned) <= 5
    assert bytes_of(DATA / "llama_tiny") == source
