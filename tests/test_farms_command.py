"""The command `farms`: what it prints, what it writes, and one line for every mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from farms_jax.__main__ import main
from farms_jax.diagnosis import Diagnosis

FAST = ["--resamples", "0", "--no-randomize"]


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "model.npz"
    np.savez(path, **{"dense/kernel": rng.normal(size=(32, 48)), "dense/bias": np.zeros(48), "steps": np.array(3)})
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def farms(monkeypatch, capsys):
    """Runs the command in this process; what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["farms", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(farms, capsys):
    """Runs the command, which says in one line what is wrong; that line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            farms(*arguments)
        told = capsys.readouterr().err
        assert (stop.value.code, told.count("\n")) == (2, 1)
        assert told.startswith(f"farms {arguments[0]}: ")
        return told

    return run


def test_a_table_and_three_files(farms, model, tmp_path):
    outputs = {kind: tmp_path / "out" / f"report.{kind}" for kind in ("csv", "json", "html")}
    told = farms("analyze", model, *FAST, *(part for kind, path in outputs.items() for part in (f"--{kind}", path)))
    assert "1 layer" in told
    assert all(f"written to {path}" in told for path in outputs.values())
    assert Diagnosis.read_json(outputs["json"]).names == ("dense/kernel",)
    assert outputs["csv"].read_text().startswith("layer,status,reason,shape")
    assert "dense/kernel" in outputs["html"].read_text()


def test_windows_and_patterns_are_those_asked_for_and_the_second_run_measures_nothing(farms, model, tmp_path):
    flags = ("--rows", 16, "--per-axis", 3, "--include", "dense/.*", "--json", tmp_path / "out.json")
    for more, from_cache in ((), 0), ((), 1), (["--no-cache"], 0):
        farms("analyze", model, *FAST, *flags, *more)
        diagnosis = Diagnosis.read_json(tmp_path / "out.json")
        assert diagnosis.facts["from_cache"] == from_cache
        assert diagnosis.column("num_windows") == [9]
        assert dict(diagnosis.left_out)["steps"] == "not included"


def test_as_a_program_explain_lists_every_array_and_measures_nothing(model, tmp_path):
    command = [sys.executable, "-m", "farms_jax", "analyze", str(model), "--explain"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.stderr == ""
    assert lines["dense/kernel"].endswith("a layer")
    assert "left out: bias" in lines["dense/bias"]
    assert "left out: dtype int64" in lines["steps"]
    assert not (tmp_path / "cache").exists()


def test_the_table_can_be_sorted(farms, tmp_path):
    weight = np.random.default_rng(0).normal(size=(32, 48))
    np.savez(tmp_path / "model.npz", a=weight * 2, d=weight, e=weight * 3)
    orders = {"": "ade", "--sort whole_norm": "ead", "--sort whole_norm --ascending": "dae", "--sort layer": "ade"}
    for flags, order in orders.items():
        told = farms("analyze", tmp_path / "model.npz", *FAST, *flags.split())
        assert "".join(line[0] for line in told.splitlines() if line[1:2] == " " and line[0] != " ") == order


def test_compare_prints_and_writes_what_moved(farms, model, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, **{"dense/kernel": np.load(model)["dense/kernel"] * 2})
    told = farms("compare", model, other, *FAST, "--json", tmp_path / "changes.json")
    assert "of one name" in told
    (row,) = json.loads((tmp_path / "changes.json").read_text())["layers"]
    assert row["moved"] == pytest.approx(1)


def test_watch_writes_alerts(farms, tmp_path):
    weight = np.random.default_rng(0).normal(size=(32, 48))
    for step, value in ((1, weight), (2, np.ones_like(weight))):
        (tmp_path / "run" / f"step_{step}").mkdir(parents=True)
        np.savez(tmp_path / "run" / f"step_{step}" / "model.npz", dense=value)
    told = farms("watch", tmp_path / "run", "--once", *FAST)
    assert "ALERT degenerate: dense: constant: every weight is 1" in told
    again = farms("watch", tmp_path / "run", "--once", *FAST)
    assert "ALERT" not in again
    assert "0 alerts, 1 more told before" in again
    lines = (tmp_path / "run" / "farms" / "alerts.jsonl").read_text().splitlines()
    assert [json.loads(line)["rule"] for line in lines] == ["degenerate"]
    assert len(list((tmp_path / "run" / "farms").glob("*.json"))) == 2
    safetensors.numpy.save_file({"dense": weight}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"dense": "part.safetensors"}}')
    told = farms("watch", tmp_path, "--once", *FAST, "--out", tmp_path / "out")  # the directory itself is a checkpoint
    assert f"{tmp_path}: {tmp_path.name}: 1 layer" in told
    assert Diagnosis.read_json(tmp_path / "out" / f"{tmp_path.name}.json").names == ("dense",)


def test_a_reader_that_stops_reading_is_no_mistake(model):
    command = [sys.executable, "-m", "farms_jax", "analyze", str(model), "--explain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "missing.npz"], "missing.npz"),
        (["analyze", "MODEL", "--sort", "alfa"], "--sort: there is no column 'alfa'"),
        (["analyze", "MODEL", "--html", "."], "--html .: a folder"),
        (["analyze", "MODEL", "--exclude", "nothing"], "exclude: 'nothing' matches no name"),
        (["analyze", "MODEL", "--rows", "0"], "rows must be a whole number of at least 1"),
        (["analyze", "MODEL", "--tolerance", "0.1", "--resamples", "0"], "tolerance needs resamples"),
        (["compare", "MODEL", "MODEL", "--sort", "alfa"], "--sort: there is no column 'alfa'"),
        (["watch", "missing"], "missing"),
    ],
)
def test_a_mistake_is_one_line(fails, model, arguments, message):
    assert message in fails(*(model if argument == "MODEL" else argument for argument in arguments))


def test_damaged_layers_are_told_and_end_with_status_1(farms, model, tmp_path, capsys):
    weights = dict(np.load(model)) | {"head/kernel": np.full((32, 48), np.inf)}
    np.savez(tmp_path / "damaged.npz", **weights)
    for others, flags in ((model,), ()), ((), ("--html", tmp_path / "out.html", "--json", tmp_path / "out.json")):
        with pytest.raises(SystemExit) as stop:
            farms("analyze", tmp_path / "damaged.npz", *others, *FAST, *flags)
        assert stop.value.code == 1
        assert "head/kernel" in capsys.readouterr().out
    assert "1 layer not measured: head/kernel (1,536 of" in (tmp_path / "out.html").read_text()
    assert Diagnosis.read_json(tmp_path / "out.json").damaged.keys() == {"head/kernel"}


def test_a_bad_file_is_one_line(fails, tmp_path):
    np.savez(tmp_path / "nan.npz", dense=np.full((32, 48), np.nan))
    assert "dense (1,536 of 1,536 values are NaN or Inf)" in fails("analyze", tmp_path / "nan.npz", *FAST)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:-100])
    assert "cut.npz" in fails("analyze", tmp_path / "cut.npz", *FAST)
    np.savez(tmp_path / "numbers.npz", loss=np.array(0.5), step=np.array(3))
    told = fails("analyze", tmp_path / "numbers.npz", *FAST)
    assert "no layer to measure among its 2 arrays; 1 left out (bias, norm or other vector); see --explain" in told
    np.savez(tmp_path / "packed.npz", **{"up.B": np.ones((4, 128), np.int32), "up.s": np.ones((4, 64), np.float16)})
    assert "1 left out (quantised by Marlin, " in fails("analyze", tmp_path / "packed.npz", *FAST)
    (tmp_path / "model.bin").write_bytes(b"\x80\x02K\x01.")
    assert "never loaded" in fails("analyze", tmp_path / "model.bin", *FAST)


def test_a_recipe_that_cannot_be_written_is_refused_before_anything_is_measured(fails, model, tmp_path):
    told = fails("analyze", model, "--recipe", tmp_path / "recipe.yaml", "--json", tmp_path / "report.json")
    assert "--recipe: needs two numbered blocks" in told
    assert not list(tmp_path.glob("re*"))
