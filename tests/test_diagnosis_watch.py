"""Following a run's checkpoints."""

import numpy as np
import pytest

from farms_jax.diagnosis import Rules, watch
from farms_jax.errors import InputError

FAST = {"resamples": 0, "randomize": False}
NOISE = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
SPIKED = NOISE + 5 * np.outer(np.ones(48), np.ones(64)).astype(np.float32)


def write(run, step, **layers):
    (run / f"step_{step}").mkdir()
    np.savez(run / f"step_{step}" / "model.npz", **layers)


def found(run, **options):
    return [[(alert.layer, alert.rule) for alert in seen.alerts] for seen in watch(run, **FAST, **options)]


def test_alerts_once_when_a_rule_is_broken(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in it"):
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
    assert "NaN or Inf in a" in alert.message
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
