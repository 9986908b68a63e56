"""Two models side by side."""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from farms_jax import TORCH_AXES, Tail, Window
from farms_jax.diagnosis import compare, diagnose
from farms_jax.errors import InputError

FAST: dict[str, Any] = {"resamples": 20, "randomize": False}


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
    overlaps = [[row[f"{side}_overlap"] for side in ("left", "right")] for row in (rows["layer_1"], rows["layer_2"])]
    np.testing.assert_allclose(overlaps, 1, atol=1e-5)
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


@pytest.mark.parametrize(
    "wrap", [lambda name: f"_orig_mod.{name}", lambda name: f"module.{name}", lambda name: name[6:]]
)
def test_layers_are_found_without_what_wraps_a_model(tmp_path, wrap):
    weights = {f"model.{name}.weight": weight for name, weight in layers().items()}
    wrapped = {wrap(name): weight * np.float32(1.5) for name, weight in weights.items()}
    for name, tensors in (("plain", weights), ("wrapped", wrapped)):
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    for order in (["plain", "wrapped"], ["wrapped", "plain"]):
        comparison = compare(*(tmp_path / f"{name}.safetensors" for name in order), **FAST)
        assert set(comparison.names) == {min(name, wrap(name), key=len) for name in weights}
        assert comparison.column("moved") == pytest.approx([0.5 if order[0] == "plain" else 1 / 3] * 4)
        assert not comparison.only_a + comparison.only_b


@pytest.mark.parametrize("a", [np.float16, np.float32, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("b", [ml_dtypes.bfloat16, np.float64])
def test_any_two_dtypes(a, b):
    weight = layers()["layer_0"]
    first, second = weight.astype(a), (2 * weight).astype(b)
    (moved,) = compare({"w": first}, {"w": second}, resamples=0, randomize=False).column("moved")
    first, second = first.astype(float), second.astype(float)
    assert moved == pytest.approx(np.linalg.norm(second - first) / np.linalg.norm(first), rel=1e-5)


def test_written_diagnoses_are_compared_under_their_settings(tmp_path):
    before, after = layers(), layers(1)
    other: dict[str, Any] = {"tail": Tail("ks"), "level": 0.9}
    window: dict[str, Any] = {"window": Window(rows=16)}
    for name, settings in (("a", other), ("b", {}), ("c", window)):
        diagnose(before, **FAST | settings).write_json(tmp_path / f"{name}.json")
    with pytest.raises(
        InputError, match=r"different settings \(level 0.9 and 0.95; tail xmin ks and median\); measure"
    ):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(InputError, match=r"other settings than those asked for \(window rows 16 and 8\)"):
        compare(after, tmp_path / "c.json", window=Window(rows=8))
    taken, direct = compare(tmp_path / "a.json", after), compare(before, after, **FAST | other)
    assert taken.names == direct.names
    for column in ("alpha_change", "error"):
        assert taken.column(column) == pytest.approx(direct.column(column))
    assert "level 0.9 and 0.95" in str(taken)
    (tmp_path / "b.json").write_text((tmp_path / "b.json").read_text().replace('"xmin_pos"', '"position"'))
    with pytest.raises(InputError, match="settings are damaged, or of another version"):
        compare(tmp_path / "b.json", after)


def test_kernels_read_under_other_axes_are_not_compared():
    kernel = {"conv": np.random.default_rng(0).normal(size=(3, 3, 16, 24)).astype(np.float32)}
    first, second = (diagnose(kernel, axes={"conv": axes}, **FAST) for axes in ("HWIO", "IOHW"))
    with pytest.raises(InputError, match="3x3x16x24, was measured as 24 x 16 and as .* axes"):
        compare(first, second)


def test_a_page_and_figures_show_both_models(tmp_path):
    before = layers() | {"<b>only & a": layers()["layer_0"]}
    after = layers() | {"layer_1": heavier(before["layer_1"])}
    comparison = compare(before, after, **FAST)
    comparison.write_html(tmp_path / "page.html")
    comparison.write_json(tmp_path / "page.json")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<tbody id=") == len(comparison) == 4
    assert page.count('aria-label="spectra of layer_') == 4
    order = [name for name in before if name in after]
    assert [page.index(f'">{name.replace("_", "_<wbr>")}</button>') for name in order] == sorted(
        page.index(f'">{name.replace("_", "_<wbr>")}</button>') for name in order
    )
    assert "&lt;b&gt;only &amp; a" in page and "<b>only" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "histograms" not in json.loads((tmp_path / "page.json").read_text())
    axis: Any = comparison.plot().axes[0]
    rows = {row["layer"]: row for row in comparison.layers}
    strong, weak = axis.collections[:2]
    ((start, end),) = strong.get_segments()
    assert (start[0], end[0]) == (order.index("layer_1"),) * 2
    assert [start[1], end[1]] == pytest.approx([rows["layer_1"]["alpha_a"], rows["layer_1"]["alpha_b"]])
    assert len(weak.get_segments()) == 3
    moved: Any = comparison.plot("moved").axes[0].collections[0].get_offsets()
    assert moved[:, 1].tolist() == [rows[name]["moved"] for name in order]
    assert len(comparison.plot("spectrum", "layer_1").axes[0].patches) == 2
    written = compare(diagnose(before, **FAST), diagnose(after, **FAST))
    kind: Any
    for kind, layer, message in (
        ("bias", None, "no kind 'bias'"),
        ("alpha", "layer_1", "leave out `layer`"),
        ("spectrum", "layer_9", "no layer 'layer_9'"),
        ("moved", None, "no layer has moved"),
    ):
        with pytest.raises(InputError, match=message):
            written.plot(kind, layer)
