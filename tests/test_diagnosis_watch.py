"""Following a run's checkpoints."""

import numpy as np
import pytest

from farms_jax.diagnosis import Rules, watch
from farms_jax.errors import InputError

FAST = {"resamples": 0, "randomize": False}
NOISE = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
SPIKED = NOISE + 5 * np.outer(np.ones(48), np.ones(64)).astype(np.float32)


def write(run, step, **layers):
    folder = run / f"step_{step}"
    folder.mkdir(parents=True)
    np.savez(folder / "model.npz", **layers)


def found(run, **options):
    return [[(alert.layer, alert.rule) for alert in seen.alerts] for seen in watch(run, **FAST, **options)]


def test_alerts_once_when_a_rule_is_broken(tmp_path):
    write(tmp_path, 1, a=NOISE, b=NOISE, c=NOISE)
    write(tmp_path, 2, a=SPIKED, b=np.ones_like(NOISE), c=NOISE)
    write(tmp_path, 10, a=SPIKED, b=np.zeros_like(NOISE), c=NOISE)
    assert found(tmp_path) == [[], [("a", "spikes"), ("b", "degenerate")], []]
    assert found(tmp_path, rules=Rules(spikes=2)) == [[], [("b", "degenerate")], []]


def test_alpha_below_its_bound(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in it"):
        found(tmp_path)
    write(tmp_path, 1, a=NOISE)
    assert found(tmp_path) == [[]]
    (alerts,) = [seen.alerts for seen in watch(tmp_path, rules=Rules(ww_alpha_below=1000.0), **FAST)]
    assert [alert.rule for alert in alerts] == ["ww_alpha"]
    assert "is below 1000" in alerts[0].message
    assert alerts[0].checkpoint.endswith("step_1") or alerts[0].checkpoint.endswith("model.npz")


def test_nan_is_an_alert_and_the_next_checkpoint_is_measured(tmp_path):
    write(tmp_path, 1, a=NOISE)
    write(tmp_path, 2, a=NOISE * np.nan)
    write(tmp_path, 3, a=NOISE)
    _, second, third = watch(tmp_path, **FAST)
    assert [(alert.layer, alert.rule) for alert in second.alerts] == [("", "checkpoint")]
    assert "NaN or Inf in a" in second.alerts[0].message
    assert third.diagnosis is not None and not third.alerts


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
