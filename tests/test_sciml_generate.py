"""Data sets of flows: the published layout, going on after a stop or damage, and what cannot be made."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax.errors import InputError
from farms_jax.programs.locking import locked
from sciml import generate as module, shards
from sciml.flow_config import FlowConfig, file_name
from sciml.generate import generate
from sciml.hdf5 import open_source

ROOT = Path(__file__).parent.parent
SMALL = FlowConfig(size=16, steps=3, end=0.1, count=5, seed=7)


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Shards of two trajectories, and one compilation for data sets of any count."""
    solver = functools.cache(shards._solver)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 2)
        patch.setattr(shards, "_solver", lambda config, lanes: solver(dataclasses.replace(config, count=1), lanes))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("made") / "deep" / "flows.hdf5", SMALL)


def contents(path):
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}, dict(file.attrs)


def assert_same(path, other):
    (fields, attributes), (expected, expected_attributes) = contents(path), contents(other)
    assert {name: array.tobytes() for name, array in fields.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert attributes == expected_attributes


def test_published_layout(made):
    fields, attributes = contents(made)
    shapes = {name: array.shape for name, array in fields.items()}
    lines = {"t-coordinate": (4,), "x-coordinate": (16,), "y-coordinate": (16,)}
    assert shapes == dict.fromkeys(("Vx", "Vy", "density", "pressure"), (5, 3, 16, 16)) | lines
    assert {array.dtype for array in fields.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(fields["t-coordinate"], [0, 0.05, 0.1, 0.15], rtol=1e-6)
    np.testing.assert_allclose(fields["x-coordinate"], (np.arange(16) + 0.5) / 16)
    np.testing.assert_array_equal(fields["x-coordinate"], fields["y-coordinate"])
    assert (attributes["M"], attributes["eta"], attributes["zeta"]) == (0.1, 0.01, 0.01)
    assert (attributes["seed"], attributes["initial"], attributes["redraws"]) == (7, "rand", 0)
    assert not made.with_name("flows.hdf5.parts").exists()


def test_trajectories_are_flows(made):
    fields, _ = contents(made)
    np.testing.assert_allclose(
        fields["density"].mean((2, 3)), fields["density"][:, :1].mean((2, 3)) * np.ones(3), rtol=1e-5
    )
    change = np.abs(np.diff(fields["Vx"], axis=1)).max((1, 2, 3))
    assert change.min() > 1e-3
    assert len(np.unique(fields["density"][:, 0, 0, 0])) == 5  # every one from another state
    sound = np.sqrt(5 / 3 * fields["pressure"][:, 0].mean((1, 2)) / fields["density"][:, 0].mean((1, 2)))
    mach = np.hypot(fields["Vx"], fields["Vy"])[:, 0].mean((1, 2)) / sound
    assert np.all((mach > 0.01) & (mach < 0.11))


def test_trajectory_depends_on_seed_and_index_alone(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3)
    fewer, _ = contents(generate(tmp_path / "fewer.hdf5", dataclasses.replace(SMALL, count=4)))
    for name in ("Vx", "pressure"):
        np.testing.assert_array_equal(fewer[name], contents(made)[0][name][:4])


def test_names_are_those_of_published_files():
    thin = FlowConfig(mach=1, eta=1e-8, zeta=1e-8, size=512, initial="turb")
    assert file_name(thin) == "2D_CFD_Turb_M1.0_Eta1e-08_Zeta1e-08_periodic_512_Train.hdf5"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The folder of a process that ended before it put its shards together."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "_merge", lambda *_: sys.exit("killed"))
        generate(tmp_path / "flows.hdf5", SMALL)
    return tmp_path / "flows.hdf5.parts"


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_goes_on_from_whole_shards(damage, made, parts, monkeypatch, capsys):
    path, merge, times = parts.with_name("flows.hdf5"), module._merge, []
    missing, damaged, whole = sorted(parts.glob("*.npz"))
    assert not path.exists()
    other = whole.read_bytes()  # of one trajectory instead of two
    damaged.write_bytes(other if damage == "other" else damaged.read_bytes()[:-30])
    missing.replace(parts / f"{missing.name}.part")  # what a kill leaves of the shard being written
    kept = whole.stat().st_mtime_ns
    monkeypatch.setattr(module, "_merge", lambda *args: (times.append(whole.stat().st_mtime_ns), merge(*args)))
    assert_same(generate(path, SMALL), made)
    assert f"{damaged} is damaged and computed again" in capsys.readouterr().err
    assert times == [kept] and not parts.exists()


def test_no_damage_of_a_shard_goes_unseen(parts):
    shard = parts / "0000000.npz"
    content = shard.read_bytes()
    expected = shards.read_shard(parts, range(2), SMALL)
    # Every byte that tells how to read the file, and some of its numbers.
    places = [*range(300), *range(300, len(content) - 700, 997), *range(len(content) - 700, len(content))]
    for number, place in enumerate(places):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :])
        found = shards.read_shard(parts, range(2), SMALL)
        assert found is None or all(map(np.array_equal, found, expected)), place


def test_a_shard_damaged_at_the_last_moment_is_named(parts, monkeypatch):
    monkeypatch.setattr(module, "make_shards", lambda *_: (parts / "0000002.npz").write_bytes(b"PK"))
    path = parts.with_name("flows.hdf5")
    with pytest.raises(InputError, match=r"0000002\.npz is damaged; the same command computes it again"):
        generate(path, SMALL)
    assert [entry.name for entry in path.parent.iterdir()] == [parts.name]


def test_damaged_settings_are_an_error(parts):
    for content in ("", "[1]", "{" * 100_000):
        (parts / "settings.json").write_text(content)
        with pytest.raises(InputError, match=r"settings\.json is damaged .*; delete .*\.parts to start anew"):
            generate(parts.with_name("flows.hdf5"), SMALL)


def test_flipped_bits_of_the_file_are_found_when_it_is_read(made, tmp_path):
    with closing(open_source(made)) as source:
        whole, expected = source.read(2, 0, 3), source.read(3, 1, 2)
    content = made.read_bytes()
    for channel in range(4):
        at = content.index(np.ascontiguousarray(expected[..., 1, channel]).tobytes())
        damaged = bytearray(content)
        damaged[at + 500] ^= 1
        (tmp_path / "damaged.hdf5").write_bytes(damaged)
        with closing(open_source(tmp_path / "damaged.hdf5")) as source:
            np.testing.assert_array_equal(source.read(2, 0, 3), whole)
            with pytest.raises(InputError, match=r"damaged\.hdf5: trajectory 3 cannot be read .*; the file is damaged"):
                source.read(3, 1, 2)


def test_chunks_are_some_states_of_a_trajectory():
    assert module._chunk(FlowConfig(size=128)) == (1, 3, 128, 128)
    assert module._chunk(FlowConfig(size=512)) == (1, 1, 512, 512)
    assert module._chunk(FlowConfig(size=16, steps=23)) == (1, 23, 16, 16)


def test_one_process_makes_a_file(parts, made):
    path, before = parts.with_name("flows.hdf5"), sorted(entry.name for entry in parts.iterdir())
    with locked(parts), pytest.raises(InputError, match=r"flows\.hdf5\.parts: another process is at work there"):
        generate(path, SMALL)
    assert sorted(entry.name for entry in parts.iterdir()) == before
    assert_same(generate(path, SMALL), made)


def test_a_file_that_another_process_made_meanwhile_is_kept(made, tmp_path, monkeypatch):
    path = tmp_path / "flows.hdf5"
    monkeypatch.setattr(module, "_check_space", lambda *_: shutil.copyfile(made, path))
    monkeypatch.setattr(module, "make_shards", lambda *_: pytest.fail("made twice"))
    assert generate(path, SMALL) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["flows.hdf5"]


def test_a_stop_does_not_wait_for_flows(tmp_path):
    """Flows that take an hour each, one per core; the signal does not wake the main thread."""
    program = f"""
import signal, sys, time
from farms_jax.programs.exits import run_and_end
from sciml import generate as module, shards

def solve(indices, attempts):
    if indices[0] == 0:
        time.sleep(0.5)  # until all wait
        signal.raise_signal(signal.SIGTERM)
    time.sleep(3600)

shards._solver = lambda config, lanes: solve
sys.argv = ["sciml.generate", "--out", {str(tmp_path)!r}, "--count", "20", "--size", "16"]
run_and_end(module.main)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "sciml.generate: stopped by SIGTERM; the same command goes on"
    with locked(tmp_path / f"{file_name(FlowConfig(size=16, count=20))}.parts"):
        pass  # the next process may go on


def test_a_file_of_the_same_settings_is_kept(made, capsys):
    before = made.stat().st_mtime_ns
    made.with_name("flows.hdf5.parts").mkdir()  # left by a kill between the last two acts
    assert generate(made, SMALL) == made
    assert made.stat().st_mtime_ns == before
    assert not made.with_name("flows.hdf5.parts").exists()
    assert "made earlier with the same settings" in capsys.readouterr().out


def test_a_file_of_other_settings_is_an_error(made):
    with pytest.raises(InputError, match=r"flows.hdf5: made with M 0.1, not 0.2; seed 7, not 8; delete it"):
        generate(made, dataclasses.replace(SMALL, mach=0.2, seed=8))
    assert not made.with_name("flows.hdf5.parts").exists()


def test_a_file_of_others_is_an_error(tmp_path):
    published, text = tmp_path / "published.hdf5", tmp_path / "text.hdf5"
    with h5py.File(published, "w") as file:
        file.attrs.update({"M": 0.1, "eta": 0.01, "zeta": 0.01})
    text.write_text("nothing")
    for path in (published, text):
        with pytest.raises(InputError, match="which sciml.generate has not made"):
            generate(path, SMALL)


def test_begun_with_other_settings_is_an_error(tmp_path):
    parts = tmp_path / "flows.hdf5.parts"
    parts.mkdir()
    begun = dataclasses.replace(SMALL, eta=0.5).attributes()
    (parts / "settings.json").write_text(json.dumps(begun))
    with pytest.raises(InputError, match=r"flows.hdf5.parts: made with eta 0.5, not 0.01; go on with the settings"):
        generate(tmp_path / "flows.hdf5", SMALL)


def test_a_full_disk_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    with pytest.raises(InputError, match=r"0.0 GB are free; lower --count or --size"):
        generate(tmp_path / "new" / "flows.hdf5", SMALL)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mach": 0.0}, "--mach must be a number > 0, got 0.0"),
        ({"end": float("nan")}, "--end must be a number > 0, got nan"),
        ({"eta": -0.1, "zeta": float("inf")}, "--eta must be a number >= 0, got -0.1; --zeta must be a number >= 0"),
        ({"size": 8, "steps": 1}, "--size must be an integer >= 16, got 8; --steps must be an integer >= 2, got 1"),
        ({"count": 0}, "--count must be an integer >= 1, got 0"),
        ({"seed": 2**32}, r"--seed must be below 2\*\*32"),
        ({"initial": "kh"}, "--initial must be one of rand, turb, got 'kh'"),
    ],
)
def test_settings_out_of_range(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        generate(tmp_path / "flows.hdf5", FlowConfig(**settings))
    assert not list(tmp_path.iterdir())


def pretend(monkeypatch, fails):
    """Replace the flows: state filled with the index, and a negative density where `fails(index, attempt)`."""

    def solve(indices, attempts):
        fields = np.ones((len(indices), 3, 16, 16, 4), np.float32) * np.reshape(indices + 1, (-1, 1, 1, 1, 1))
        for lane, (index, attempt) in enumerate(zip(indices, attempts, strict=True)):
            if fails(int(index), int(attempt)):
                fields[lane, 2, 3, 4, 2] = -0.1
        return jnp.asarray(fields)

    monkeypatch.setattr(shards, "_solver", lambda config, lanes: solve)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_failed_flows_are_drawn_again_and_counted(backend, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda index, attempt: (index == 3 and attempt < 2) or (index == 4 and attempt < 1))
    monkeypatch.setattr(shards.jax, "default_backend", lambda: backend)
    fields, attributes = contents(generate(tmp_path / "flows.hdf5", SMALL))
    assert attributes["redraws"] == 3  # though an accelerator's last batch is filled up with flow 4
    assert fields["density"].min() > 0
    np.testing.assert_array_equal(fields["Vx"][:, 0, 0, 0], [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda index, attempt: index == 1, "flow 1 failed 11 times; lower --mach"),
        (lambda index, attempt: attempt < 4, "failed; lower --mach, or raise --eta and --zeta"),
    ],
)
def test_settings_under_which_flows_fail(fails, message, tmp_path, monkeypatch):
    pretend(monkeypatch, fails)
    with pytest.raises(InputError, match=message):
        generate(tmp_path / "flows.hdf5", SMALL)
    assert not (tmp_path / "flows.hdf5").exists()


def test_program_reports_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sciml.generate", "--mach", "-1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "sciml.generate: --mach must be a number > 0, got -1.0\n"
