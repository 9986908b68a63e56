"""Pruning under faults: one process per run, stops by signals, and damage on the disk between two processes."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import few
from prune_helpers import DATA, Killed, assert_same_run, bytes_of, command

import prune.pruning
import prune.record
import prune.run
import prune.scores
from farms_jax.errors import InputError
from farms_jax.programs.cache import Cache
from farms_jax.programs.files import CHECKSUMS
from farms_jax.programs.locking import locked
from prune import llama
from prune.job import prepare
from prune.output import MASKS
from prune.run import run

ROOT = DATA.parent.parent
BLOCKS = 4


def killed_at(block):
    """`prune_block`, but the process ends at this block."""
    prune_block = prune.pruning.prune_block

    def prune_or_die(network, number, *arguments):
        if number == block:
            raise Killed
        return prune_block(network, number, *arguments)

    return prune_or_die


@pytest.fixture(scope="module")
def half(finished, tmp_path_factory):
    """The output of a run whose process ended at its last block."""
    config = dataclasses.replace(finished.config, out=tmp_path_factory.mktemp("half"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prune.pruning, "prune_block", killed_at(BLOCKS - 1))
        run(prepare(config))
    return config


@pytest.fixture
def stopped(half, tmp_path):
    """A job that goes on with it, in a place of its own to be damaged."""
    shutil.copytree(half.out, tmp_path / "out")
    return prepare(dataclasses.replace(half, out=tmp_path / "out"))


@pytest.fixture
def pruned(monkeypatch):
    """Numbers of the blocks that are pruned, in order."""
    numbers, prune_block = [], prune.pruning.prune_block
    monkeypatch.setattr(prune.pruning, "prune_block", lambda *a: numbers.append(a[1]) or prune_block(*a))
    return numbers


def flip(path, place):
    """Turn one bit over; `place` is a byte, or a fraction of the file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(place if isinstance(place, int) else int(place * size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def place_of(path, name):
    """Byte of a safetensors file in the middle of a tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(size))[name]["data_offsets"]
    return 8 + size + (start + stop) // 2


# --- One process per run ---------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_destroys_nothing(stopped):
    before = bytes_of(stopped.config.out)
    for changes in ({}, {"fresh": True}):
        job = dataclasses.replace(stopped, config=dataclasses.replace(stopped.config, **changes))
        with locked(stopped.path), pytest.raises(InputError, match=r"llama_tiny-.*: another process is at work there"):
            run(job)
    assert bytes_of(stopped.config.out) == before


def test_fresh_removes_all_but_the_lock_that_it_holds(finished_copy, finished, monkeypatch):
    seen, prune_block = [], prune.pruning.prune_block

    def look(*arguments):
        with pytest.raises(InputError, match="another process"), locked(finished_copy.path):
            pytest.fail("held twice")
        seen.append(sorted(path.name for path in finished_copy.path.iterdir()))
        return prune_block(*arguments)

    monkeypatch.setattr(prune.pruning, "prune_block", look)
    (finished_copy.path / "model" / "mine.txt").write_text("of an earlier run")
    run(prepare(dataclasses.replace(finished_copy.config, fresh=True)))
    assert seen == [[".lock", MASKS, "model.part", "progress.json"]] * BLOCKS
    assert bytes_of(finished_copy.path / "model") == bytes_of(finished.path / "model")


def test_two_processes_may_measure_the_same_weights(tmp_path):
    """Runs of other methods on one model share the cache of alphas: what one writes the other does not take away."""
    content = {f"layer{number}": {"alpha": number / 7} for number in range(300)}

    def work(_):
        for _ in range(30):
            Cache(tmp_path).put("key", content)
            assert Cache(tmp_path).get("key") == content

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


# --- Stopped by a signal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), few([(signal.SIGTERM, 143), (signal.SIGINT, 130)], 2))
@pytest.mark.parametrize("when", ["in a block", "after its weights are written"])
def test_a_stop_costs_the_block_alone(number, status, when, finished, tmp_path, monkeypatch, capsys, pruned):
    config = dataclasses.replace(finished.config, out=tmp_path / "out")
    module, name = {"in a block": (prune.pruning, "prune_block")}.get(when, (prune.record.Record, "put"))
    call = getattr(module, name)

    def stop(*arguments):
        if len(pruned) == 3 or (name == "prune_block" and len(pruned) == 2):
            os.kill(os.getpid(), number)
        return call(*arguments)

    monkeypatch.setattr(sys, "argv", command(config)[2:])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(module, name, stop)
        llama.main()
    assert ended.value.code == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"prune.llama: stopped by {signal.Signals(number).name}; the same command goes on from here"
    pruned.clear()
    llama.main()
    assert pruned == [2, 3]
    assert_same_run(prepare(config).path, finished.path)


# --- Damaged between two processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "tensor", "first"),
    [
        ("model.safetensors", "model.layers.1.mlp.up_proj.weight", 1),
        ("model.safetensors", "model.layers.2.input_layernorm.weight", 2),  # no layer's, but the block's
        ("../masks.safetensors", "model.layers.0.self_attn.q_proj", 0),
        ("model.safetensors", "model.layers.3.mlp.up_proj.weight", 3),  # not written yet
    ],
)
def test_pruning_goes_on_from_the_block_before_a_damaged_one(file, tensor, first, stopped, finished, pruned, capsys):
    path = stopped.path / "model.part" / file
    flip(path, place_of(path, tensor))
    run(stopped)
    assert pruned == list(range(first, BLOCKS))
    warning = f"{stopped.path / 'model.part'}: block {first} is not as it was written; pruning goes on from there"
    assert (warning in capsys.readouterr().err) == (first < 3)
    assert_same_run(stopped.path, finished.path)


@pytest.mark.parametrize(
    ("damage", "first"),
    few(
        [
            # Masks lie in the order of the blocks.
            (lambda path: os.truncate(path, place_of(path, "model.layers.1.mlp.up_proj")), 1),
            (lambda path: path.write_bytes(path.read_bytes() + b"more"), 3),
            (lambda path: path.unlink(), 0),
            (lambda path: flip(path, 12), 3),  # in the header
        ],
        4,
    ),
)
def test_a_cut_off_weight_file_costs_what_was_lost(damage, first, stopped, finished, pruned, capsys):
    path = stopped.path / "masks.safetensors"
    damage(path)
    run(stopped)
    assert pruned == list(range(first, BLOCKS))
    assert f"{path} was missing or cut off; what is lost is made again" in capsys.readouterr().err
    assert_same_run(stopped.path, finished.path)


def test_what_is_outside_the_blocks_is_looked_at_too(stopped, finished):
    part = stopped.path / "model.part"
    flip(part / "model.safetensors", place_of(part / "model.safetensors", "model.embed_tokens.weight"))
    # What a killed process left half written is not part of the model.
    (part / "config.json.part").write_text("{")
    (part / "tmpdraft").mkdir()
    (part / "tmpdraft" / "tokenizer.json").write_text("{")
    run(stopped)
    assert_same_run(stopped.path, finished.path)


def test_a_finished_model_has_checksums(finished):
    for folder, names in (
        (finished.path / "model", ["config.json", "generation_config.json", "model.safetensors"]),
        (finished.path, [MASKS]),
    ):
        done = subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout == "".join(f"{name}: OK\n" for name in names)


@pytest.mark.parametrize(
    ("name", "place"), few([("model.safetensors", 0.7), ("../masks.safetensors", 0.9), (CHECKSUMS, 5)], 3)
)
def test_a_finished_model_that_is_damaged_is_named(name, place, finished_copy, finished, pruned):
    model = finished_copy.path / "model"
    path = (model / name).resolve()
    flip(path, place)
    before = bytes_of(finished_copy.path)
    named = path if name != CHECKSUMS else path.with_name("config.json")  # the line of which is no longer right
    with pytest.raises(InputError, match=rf"^{named}: damaged, or changed .*; remove .*model, and the same command"):
        run(finished_copy)
    assert bytes_of(finished_copy.path) == before  # whose change it was is not for the program to say
    shutil.rmtree(model)
    run(finished_copy)
    assert pruned == list(range(BLOCKS))
    assert_same_run(finished_copy.path, finished.path)


def test_a_damaged_record_is_never_believed(finished_copy):
    path = finished_copy.path / "progress.json"
    content = path.read_bytes()
    at = content.index(b'"perplexity": ') + len(b'"perplexity": ')
    other_number = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    other_checksum = content.replace(b'"sha256": "', b'"sha256": "0', 1)
    for damaged in (other_number, other_checksum, content[: len(content) // 2], b"", b"[]", b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"progress\.json is damaged \(.*\); start anew with --fresh$"):
            run(finished_copy)
    assert (finished_copy.path / "model" / "model.safetensors").exists()


def test_the_card_is_written_again_from_the_record(finished_copy, monkeypatch):
    path = finished_copy.path / "run.json"
    before = path.read_bytes()
    monkeypatch.setattr(prune.run, "make_card", lambda *_: pytest.fail("with the versions of today"))
    for damage in (path.unlink, lambda: path.write_text("]")):
        damage()
        run(finished_copy)
        assert path.read_bytes() == before


def test_damaged_alphas_are_measured_again(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished.config, out=tmp_path / "out", dry_run=True)
    table = run(prepare(dataclasses.replace(finished.config, dry_run=True)))
    entries = sorted(shutil.copytree(finished.config.out / "cache", config.out / "cache").glob("alphas/*.json"))
    for path, damage in zip(entries, itertools.cycle(["another number", "cut off", "empty"]), strict=False):
        content = path.read_text()
        at = content.index('"alpha": ') + len('"alpha": ')
        digit = str((int(content[at]) + 1) % 9 + 1)
        changed = {"another number": content[:at] + digit + content[at + 1 :], "cut off": content[:at], "empty": ""}
        path.write_text(changed[damage])
    analysed = []
    analyze = prune.scores.farms_jax.analyze
    monkeypatch.setattr(prune.scores.farms_jax, "analyze", lambda *a, **k: analysed.append(1) or analyze(*a, **k))
    assert run(prepare(config)) == table
    assert len(analysed) == BLOCKS
    analysed.clear()
    run(prepare(dataclasses.replace(config, allocation="alphapruning")))  # another analysis: nothing of it is there
    run(prepare(dataclasses.replace(config, method="magnitude")))  # the same one, by what was written again
    assert len(analysed) == BLOCKS
