"""Two models side by side."""

import json

import numpy as np
import pytest
import safetensors.numpy

from farms_jax import TORCH_AXES
from farms_jax.diagnosis import compare, diagnose
from farms_jax.errors import InputError

FAST = {"resamples": 20, "randomize": False}


def layers(seed=0):
    rng = np.random.default_rng(seed)
    return {f"layer_{i}": rng.normal(size=(24, 32)).astype(np.float32) for i in range(4)}


def heavier(weight):
    """The same matrix with a tail: singular values of a power law."""
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    values = np.sort((1 - np.random.default_rng(1).uniform(size=len(left))) ** -1.5)[::-1]
    return ((left * values) @ right).astype(np.float32)


def test_what_moved_most_comes_first():
    before = layers() | {"only a": np.ones((24, 32))}
    after = layers() | {"layer_1": heavier(before["layer_1"]), "layer_2": before["layer_2"] * 1.5}
    after["layer_3"], after["only b"] = before["layer_3"][:20, :12], before["only a"]
    comparison = compare(before, after, **FAST)
    assert (comparison.only_a, comparison.only_b) == (("only a",), ("only b",))
    assert comparison.layers[0]["layer"] == "layer_1"
    rows = {row["layer"]: row for row in comparison.layers}
    assert rows["layer_1"]["alpha_change"] < -0.1
    assert rows["layer_1"]["beyond_error"]
    assert (rows["layer_0"]["moved"], rows["layer_0"]["alpha_change"]) == (0, 0)
    assert not rows["layer_0"]["beyond_error"]
    assert rows["layer_2"]["moved"] == pytest.approx(0.5)
    assert rows["layer_2"]["alpha_change"] == pytest.approx(0, abs=1e-4)
    for row in comparison.layers:
        assert row["alpha_change"] == pytest.approx(row["alpha_b"] - row["alpha_a"])
    assert "moved" not in rows["layer_3"]
    assert rows["layer_3"]["shape"] == "24x32 -> 20x12"
    with pytest.raises(InputError, match=r"no layer of one name: layer_0 in the first, other in the second"):
        compare(before, {"other": after["layer_1"]}, **FAST)


def test_written_diagnoses_can_be_compared(tmp_path):
    before, after = layers(), layers(1)
    for name, model in (("a", before), ("b", after)):
        diagnose(model, **FAST).write_json(tmp_path / f"{name}.json")
    written, direct = compare(tmp_path / "a.json", tmp_path / "b.json"), compare(before, after, **FAST)
    assert written.names == direct.names
    assert written.column("alpha_change") == pytest.approx(direct.column("alpha_change"))
    assert "moved" not in written.layers[0]


def test_a_lora_adapter_is_its_base_with_the_change_added(tmp_path):
    rng = np.random.default_rng(3)
    base = {f"model.layers.{i}.mlp.up_proj.weight": rng.normal(size=(24, 32)).astype(np.float32) for i in range(2)}
    down, up = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=(24, 4)).astype(np.float32)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    adapter = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    safetensors.numpy.save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    comparison = compare(base, tmp_path, axes=TORCH_AXES, **FAST)
    merged = base | {"model.layers.1.mlp.up_proj.weight": base["model.layers.1.mlp.up_proj.weight"] + 2 * up @ down}
    expected = compare(base, merged, axes=TORCH_AXES, **FAST)
    assert comparison.names == expected.names
    for name in ("moved", "alpha_b"):
        assert comparison.column(name) == pytest.approx(expected.column(name), rel=1e-5)
    assert comparison.column("moved")[0] > 0.5
    assert comparison.column("moved")[1] == 0
    with pytest.raises(InputError, match="needs the weights of its base model"):
        compare(diagnose(base, **FAST), tmp_path, **FAST)
