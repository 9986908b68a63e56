"""From a model to its diagnosis: which layers, in which order, what is kept, and clear errors."""

import json
import warnings

import jax
import numpy as np
import pytest

import farms_jax
from farms_jax import FLAX_AXES
from farms_jax.diagnosis import compare, diagnose
from farms_jax.diagnosis.in_memory import open_in_memory
from farms_jax.errors import AxesWarning, InputError, LeftOutWarning
from farms_jax.programs.cache import weights_key, with_checksum

FAST = {"resamples": 20, "randomize": False}


def model(seed=0):
    rng = np.random.default_rng(seed)
    heavy = rng.standard_t(2, (24, 32)) + np.outer(rng.normal(size=24), rng.normal(size=32))
    return {
        "block_2": {"kernel": rng.normal(size=(32, 40)).astype(np.float32), "bias": np.zeros(40, np.float32)},
        "block_10": {"kernel": heavy.astype(np.float32)},
        "conv": {"kernel": rng.normal(size=(2, 2, 16, 24)).astype(np.float32)},
        "steps": np.array(3),
    }


def write_npz(path, tree):
    np.savez(path, **{name: np.asarray(leaf) for name, leaf in farms_jax.named_leaves(tree)})
    return path


def test_layers_are_in_network_order_and_arrays_stay_as_they_are():
    weights = model()
    diagnosis = diagnose(weights)
    assert diagnosis.names == ("conv/kernel", "block_2/kernel", "block_10/kernel")
    assert diagnosis.column("M") == [16, 32, 24]
    assert diagnosis.column("place") == [1, 2, 3]
    assert diagnosis.left_out == (
        ("block_2/bias", "bias, norm or other vector"),
        ("steps", "dtype int64, not floating point"),
    )
    assert sorted(diagnosis.column("rank")) == [1, 2, 3]
    assert all(row["status"] and row["reason"] for row in diagnosis.layers)
    jax.tree.map(np.testing.assert_array_equal, weights, model())


def test_patterns_choose_layers():
    diagnosis = diagnose(model(), include=r"block_.*", exclude=(r".*_2/.*",), **FAST)
    assert diagnosis.names == ("block_10/kernel",)
    assert dict(diagnosis.left_out) == {
        "block_2/bias": "excluded",
        "block_2/kernel": "excluded",
        "conv/kernel": "not included",
        "steps": "not included",
    }
    with pytest.raises(ValueError, match=r"include: 'blok.*' matches no name"):
        diagnose(model(), include="blok.*")


@pytest.mark.parametrize(
    ("settings", "absent", "present"),
    [
        ({"resamples": 0, "randomize": False}, {"rank", "alpha_low"}, {"ww_alpha", "mp_spikes"}),
        ({"whole": False, "resamples": 20}, {"ww_alpha", "whole_alpha", "mp_sigma", "rand_distance"}, {"rank_flips"}),
        ({"resamples": 0}, {"rank_flips"}, {"rand_distance", "ww_softrank"}),
    ],
)
def test_columns_follow_the_settings(settings, absent, present):
    diagnosis = diagnose({"layer": model()["block_10"]["kernel"]}, **settings)
    (row,) = diagnosis.layers
    assert not absent & set(row)
    assert {"alpha", *present} <= set(row)
    assert bool(diagnosis.histograms["layer"].whole) == settings.get("whole", True)


def test_only_what_changed_is_measured_again_and_a_file_is_what_its_arrays_are(tmp_path):
    cache, weights = tmp_path / "cache", model()
    first = diagnose(write_npz(tmp_path / "model.npz", weights), cache=cache, axes=FLAX_AXES, **FAST)
    again = diagnose(weights, cache=cache, **FAST)
    assert (first.facts["from_cache"], again.facts["from_cache"]) == (0, 3)
    assert again.layers == first.layers
    assert again.histograms == first.histograms
    weights["block_10"]["kernel"] = weights["block_10"]["kernel"] * 2
    changed = diagnose(weights, cache=cache, **FAST)
    assert changed.facts["from_cache"] == 2
    assert changed.column("whole_norm")[2] == pytest.approx(4 * first.column("whole_norm")[2])
    other = diagnose(weights, cache=cache, **FAST | {"seed": 1})
    assert other.facts["from_cache"] == 0
    hashes = [diagnosis.facts["weights_sha256"] for diagnosis in (first, changed, other)]
    assert hashes[0] != hashes[1] == hashes[2]  # of the weights, whatever the settings


def test_a_key_tells_weights_and_settings_apart():
    weight = np.arange(6.0).reshape(2, 3)
    others = [weight.reshape(3, 2), weight.astype(np.float32), weight + 1]
    keys = [weights_key({"a": array}) for array in (weight, *others)]
    keys += [weights_key({"b": weight}), weights_key({"a": weight}, 1)]
    assert len(set(keys)) == len(keys)
    assert weights_key({"a": np.asfortranarray(weight)}) == keys[0]


def test_a_damaged_cache_is_no_cache(tmp_path):
    weights = {"layer": model()["block_10"]["kernel"]}
    first = diagnose(weights, cache=tmp_path, **FAST)
    (kept,) = tmp_path.iterdir()
    other = json.dumps(with_checksum({"row": 1, "deviations": [], "histogram": {}}))
    for content in ("", "[]", kept.read_text().replace("alpha", "alfa", 1), "{" * 100_000, other):
        kept.write_text(content)
        again = diagnose(weights, cache=tmp_path, **FAST)
        assert again.facts["from_cache"] == 0
        assert again.layers == first.layers
        assert json.loads(kept.read_text())["row"]


def test_layers_with_nan_are_left_out_and_told_first(tmp_path):
    weights = model()
    weights["conv"]["kernel"][0, 0, 0, 0] = np.nan
    weights["block_2"]["kernel"][0, 0] = np.inf
    path = write_npz(tmp_path / "model.npz", weights)
    diagnosis = diagnose(path, **FAST)
    assert diagnosis.layers == diagnose(path, include="block_10/.*", **FAST).layers
    size = weights["conv"]["kernel"].size
    assert diagnosis.damaged["conv/kernel"] == f"1 of {size:,} values is NaN or Inf"
    assert list(diagnosis.damaged) == ["block_2/kernel", "conv/kernel"]
    assert diagnosis.damaged.items() <= dict(diagnosis.left_out).items()
    assert "2 not measured; look first at block_2/kernel (1 of" in diagnosis.headline()
    assert diagnosis.steps()[0].found.startswith("2 layers not measured: block_2/kernel")
    with pytest.raises(InputError, match=r"no layer that can be measured: block_2/kernel .*, conv/kernel \(1 of"):
        diagnose(path, exclude="block_10/.*", **FAST)
    comparison = compare(diagnose(model(), **FAST), diagnosis)
    assert comparison.only_a == ()
    assert list(comparison.damaged["B"]) == ["block_2/kernel", "conv/kernel"]


def test_a_layer_that_cannot_be_read_is_left_out(monkeypatch):
    source = open_in_memory(model())
    read = source.read_layer

    def failing(name, axes, index):
        if name == "conv/kernel":
            raise InputError(f"{source.path}: {name} ends too early")
        return read(name, axes, index)

    monkeypatch.setattr(source, "read_layer", failing)
    diagnosis = diagnose(source, **FAST)
    assert diagnosis.damaged == {"conv/kernel": "conv/kernel ends too early"}
    assert set(diagnosis.names) == {"block_2/kernel", "block_10/kernel"}


def test_a_warning_of_what_is_left_out_is_of_what_was_asked_for():
    draw = np.random.default_rng(0).normal
    weights = {"stack": {"kernel": draw(size=(3, 4, 5, 64, 48))}, "dense": {"kernel": draw(size=(64, 48))}}
    with pytest.warns(LeftOutWarning, match="stack/kernel"):
        diagnose(weights, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert diagnose(weights, include="dense/.*", **FAST).names == ("dense/kernel",)


@pytest.mark.parametrize(
    "settings", [{"resamples": -1}, {"level": 1.0}, {"tolerance": 0.0}, {"tolerance": 0.1, "resamples": 0}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="Settings: "):
        diagnose(model(), **settings)


def test_a_matrix_that_is_alone_is_measured_whatever_its_name():
    transitions = np.log(np.arange(1, 17, dtype=np.float32)) * np.ones((128, 1), np.float32)
    with pytest.warns(AxesWarning, match="A_log is the only matrix"):
        found = diagnose({"mixer/A_log": transitions, "mixer/D": np.ones(128)}, resamples=0)
    assert "rank one" in found.layers[0]["reason"]
    beside = {"mixer/A_log": transitions, "mixer/in_proj/kernel": np.random.default_rng(0).normal(size=(16, 128))}
    assert [row["layer"] for row in diagnose(beside, resamples=0).layers] == ["mixer/in_proj/kernel"]
