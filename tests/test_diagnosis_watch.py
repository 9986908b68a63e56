"""Following a run's checkpoints."""

import json
import shutil
import sys
import zipfile

import numpy as np
import pytest

from farms_jax.diagnosis import Rules, watch
from farms_jax.diagnosis.watch_log import WatchLog
from farms_jax.errors import InputError
from farms_jax.weights import checkpoints

FAST = {"resamples": 0, "randomize": False}
NOISE = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
SPIKED = NOISE + 5 * np.outer(np.ones(48), np.ones(64)).astype(np.float32)


def write(run, step, **layers):
    (run / f"step_{step}").mkdir()
    np.savez(run / f"step_{step}" / "model.npz", **layers)


def found(run, **options):
    return [[(alert.layer, alert.rule) for alert in seen.alerts] for seen in watch(run, **FAST, **options)]


def test_alerts_once_when_a_rule_is_broken(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in it; give"):
        found(tmp_path)
    (tmp_path / "epoch_1.pkl").touch()
    with pytest.raises(InputError, match="no checkpoint in it, and .*epoch_1.pkl is of a kind that is not read: save"):
        found(tmp_path)
    write(tmp_path, 1, a=NOISE, d=NOISE, e=NOISE)
    write(tmp_path, 2, a=SPIKED, d=np.ones_like(NOISE), e=NOISE)
    write(tmp_path, 10, a=SPIKED, d=np.zeros_like(NOISE), e=NOISE)
    assert found(tmp_path) == [[], [("a", "spikes"), ("d", "degenerate")], []]
    assert found(tmp_path, rules=Rules(spikes=2)) == [[], [("d", "degenerate")], []]


def test_alpha_below_its_bound_and_nan(tmp_path):
    for step, weight in enumerate((NOISE, NOISE * np.nan, NOISE)):
        write(tmp_path, step, a=weight)
    first, second, third = watch(tmp_path, rules=Rules(ww_alpha_below=1000.0), **FAST)
    (alert,) = first.alerts
    assert (alert.rule, alert.checkpoint) == ("ww_alpha", str(tmp_path / "step_0" / "model.npz"))
    assert "is below 1000" in alert.message
    (alert,) = second.alerts
    assert (alert.layer, alert.rule) == ("", "checkpoint")
    assert "a (3,072 of 3,072 values are NaN or Inf)" in alert.message
    assert third.diagnosis is not None and not third.alerts


def test_one_layer_with_nan_is_an_alert_once(tmp_path):
    for step, factor in enumerate((1, np.inf, np.inf, 1)):
        write(tmp_path, step, a=NOISE * factor, e=NOISE)
    assert found(tmp_path) == [[], [("a", "damaged")], [], []]


def test_a_norm_that_explodes_or_vanishes(tmp_path):
    for step, scale in enumerate((1, 90, 3e20, 1e-26)):
        write(tmp_path, step, a=(NOISE * scale).astype(np.float32))
    assert found(tmp_path) == [[], [], [("a", "scale")], [("a", "scale")]]
    assert found(tmp_path, rules=Rules(scale=80)) == [[], *[[("a", "scale")]] * 3]


def test_a_half_written_checkpoint_is_tried_again(tmp_path):
    write(tmp_path, 1, a=NOISE)
    following = watch(tmp_path, every=0.01, **FAST)
    assert next(following).diagnosis is not None
    write(tmp_path, 2, a=SPIKED)
    cut = tmp_path / "step_2" / "model.npz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert [alert.rule for alert in next(following).alerts] == ["checkpoint"]
    np.savez(cut, a=SPIKED)
    assert [alert.rule for alert in next(following).alerts] == ["spikes"]


def test_nothing_in_the_run_ends_it(tmp_path, monkeypatch):
    for step in range(4):
        write(tmp_path, step, a=NOISE)
    (tmp_path / "step_1" / "model.npz").write_bytes(b"no archive")
    (tmp_path / "loop").symlink_to("loop")
    module = sys.modules["farms_jax.diagnosis.watch"]
    solve = module.diagnose

    def diagnose(path, **options):
        if path.parent.name == "step_2":
            raise np.linalg.LinAlgError("SVD did\nnot converge")
        if path.parent.name == "step_3":
            shutil.rmtree(path.parent)
        return solve(path, **options)

    monkeypatch.setattr(module, "diagnose", diagnose)
    seen = sorted(watch(tmp_path, **FAST))
    assert [one.checkpoint.parent.name for one in seen] == ["step_0", "step_1", "step_2"]
    damaged, broken = (alert.message for one in seen for alert in one.alerts)
    assert damaged.startswith(f"{tmp_path}/step_1/model.npz: damaged, or no npz archive")
    assert broken == f"{tmp_path}/step_2/model.npz: cannot be measured (LinAlgError: SVD did not converge)"


def test_a_run_that_is_empty_gone_or_back(tmp_path):
    (run := tmp_path / "run").mkdir()
    steps = iter([lambda: write(run, 1, a=NOISE), lambda: shutil.move(run, tmp_path / "away"), lambda: back(tmp_path)])

    def back(folder):
        shutil.move(folder / "away", run)
        write(run, 2, a=SPIKED)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as told:
        patch.setattr("time.sleep", lambda _: next(steps)())
        following = watch(run, every=0.01, **FAST)
        assert [len(next(following).alerts) for _ in range(2)] == [0, 1]
    assert [str(one.message) for one in told] == [
        f"{run}: no checkpoint in it yet; it is looked at every 0.01 seconds",
        f"{run}: no such folder; give the directory of a run; it is looked at again",
    ]


def shard(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def test_what_is_a_checkpoint(tmp_path):
    trainer, sharded, index, twins = (tmp_path / f"checkpoint-{number}" for number in range(4))
    for folder in (trainer, sharded, index, twins):
        folder.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt"):
        shard(trainer / name)
    (trainer / "global_step5").mkdir()
    shard(trainer / "global_step5" / "mp_rank_00_model_states.pt")
    shard(sharded / "pytorch_model-00001-of-00002.bin")
    shard(index / "model-00001-of-00002.bin")
    (index / "model.bin.index.json").write_text("{}")
    np.savez(twins / "net.npz", a=NOISE)
    shard(twins / "net.pt")
    for name in ("epoch=1-step=100.ckpt", "best.ckpt", "last.ckpt", "model_1.pth.tar", "data.bin", "args.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "newest.ckpt").symlink_to("last.ckpt")
    (tmp_path / "sharded_by_torch").mkdir()
    (tmp_path / "sharded_by_torch" / "__0_0.distcp").touch()
    names = {
        "sharded_by_torch",
        "epoch=1-step=100.ckpt",
        "last.ckpt",
        "model_1.pth.tar",
        "checkpoint-0/pytorch_model.bin",
        "checkpoint-2",
    }
    expected = {tmp_path / name for name in names} | {twins / "net.npz"}
    assert set(checkpoints(tmp_path)) == expected
    shard(sharded / "pytorch_model-00002-of-00002.bin")
    assert set(checkpoints(tmp_path)) == expected | {sharded}


def test_how_to_get_torch_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for epoch in (1, 2):
        shard(tmp_path / f"epoch_{epoch}.pt")
    following = watch(tmp_path, every=60.0, **FAST)  # at once: nothing waits
    first, second = (next(following).alerts[0].message for _ in range(2))
    assert 'epoch_1.pt: saved by torch, which is not installed: pip install "farms-jax[torch]"' in first
    assert second == f"{tmp_path}/epoch_2.pt: saved by torch, which is not installed"


def log(run, **options):
    """Watch once and write the log; return the alerts that it has then."""
    written = WatchLog(run, run / "farms")
    for seen in watch(run, earlier=written.earlier(), **FAST, **options):
        written.add(seen)
    return [(alert["checkpoint"], alert["rule"]) for alert in map(json.loads, lines(run))]


def lines(run):
    return (run / "farms" / "alerts.jsonl").read_text().splitlines()


def test_alerts_are_only_added_to(tmp_path, monkeypatch):
    write(tmp_path, 1, a=NOISE)
    write(tmp_path, 2, a=NOISE * 0)
    told = [(str(tmp_path / "step_2" / "model.npz"), "degenerate")]
    assert log(tmp_path) == told
    monkeypatch.chdir(tmp_path)
    assert log(tmp_path.relative_to(tmp_path)) == told  # again, from another place
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step_{step}")
    write(tmp_path, 3, a=NOISE * 0)  # as it was before: no news
    assert log(tmp_path) == told
    write(tmp_path, 4, a=NOISE * np.nan)
    file = tmp_path / "farms" / "alerts.jsonl"
    file.write_text(file.read_text() + '{"checkpoint": "x", "rule": "cut off"}')
    assert log(tmp_path) == [*told, ("x", "cut off"), (str(tmp_path / "step_4" / "model.npz"), "checkpoint")]


def test_no_two_checkpoints_have_one_file(tmp_path):
    names = ["a-b.npz", "a/b.npz", "a%2Fb.npz", "step_1.5/m.npz", "step_1.7/m.npz", "m.1.npz", "m.2.npz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / name, a=NOISE)
    log(tmp_path)
    paths = {json.loads(file.read_text())["facts"]["path"] for file in (tmp_path / "farms").glob("*.json")}
    assert paths == {str(tmp_path / name) for name in names}


def test_a_log_that_cannot_be_written_costs_a_warning(tmp_path):
    write(tmp_path, 1, a=NOISE * 0)
    (tmp_path / "farms").write_text("a file")
    (seen,) = watch(tmp_path, **FAST)
    written = WatchLog(tmp_path, tmp_path / "farms")
    with pytest.warns(UserWarning, match=r": cannot be written \(.*\); free space, or") as told:
        written.add(seen)
    assert [str(one.message).partition(":")[0].rpartition("/")[2] for one in told] == [
        "alerts.jsonl",
        "step_1%2Fmodel.npz.json",
    ]
    (tmp_path / "farms").unlink()
    written.add(seen)
    assert len(lines(tmp_path)) == 1
