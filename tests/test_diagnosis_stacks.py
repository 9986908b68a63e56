"""Diagnoses of stacks: scanned layers, experts in one tensor; the same declarations as in `analyze`, by file too."""

import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import farms_jax
from farms_jax import AxisRules, axis_rules
from farms_jax.__main__ import main
from farms_jax.errors import InputError

RNG = np.random.default_rng(0)
LAYERS = 3
QUICK = {"resamples": 0, "randomize": False}
PARAMS = {
    "blocks": {
        "query": {"kernel": RNG.standard_normal((32, LAYERS, 4, 8)).astype("f"), "bias": np.zeros((LAYERS, 4, 8), "f")},
        "up": {"kernel": RNG.standard_normal((32, LAYERS, 48)).astype("f")},
    },
    "head": {"kernel": RNG.standard_normal((32, 40)).astype("f")},
}
RULES = AxisRules({r".*/query/kernel": "IOO"}, stack={r"blocks/.*": 1})
FLAT = {name: leaf for name, leaf in farms_jax.named_leaves(PARAMS)} | {
    "blocks/query/bias": np.zeros((4, LAYERS, 8), "f")
}
DECLARED = """
[axes]
".*/query/kernel" = "IOO"
[stack]
"blocks/.*" = 1
"""


def one_by_one():
    """The same layers in trees without a stack."""
    for i in range(LAYERS):
        yield f"blocks/query/kernel[{i}]", PARAMS["blocks"]["query"]["kernel"][:, i].reshape(32, 32)
        yield f"blocks/up/kernel[{i}]", PARAMS["blocks"]["up"]["kernel"][:, i]
    yield "head/kernel", PARAMS["head"]["kernel"]


@pytest.fixture
def farms(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["farms", *map(str, arguments)])
        main()
        return "".join(capsys.readouterr())

    return run


def test_every_layer_of_a_stack_is_diagnosed_as_if_it_were_alone():
    diagnosis = farms_jax.diagnose(FLAT, axes=RULES, **QUICK)
    layers = dict(one_by_one())
    assert set(diagnosis.column("layer")) == set(layers)
    alone = farms_jax.diagnose({name.replace("[", "_"): layer for name, layer in layers.items()}, **QUICK)
    for row in diagnosis.layers:
        own = next(other for other in alone.layers if other["layer"] == row["layer"].replace("[", "_"))
        for name in ("alpha", "whole_alpha", "ww_alpha", "num_params", "status"):
            assert row[name] == own[name], (row["layer"], name)
    assert dict(diagnosis.left_out)["blocks/query/bias"] == "bias, norm or other vector"
    report = farms_jax.analyze(FLAT, axes=RULES)
    found = dict(zip(report.names, np.asarray(report.alpha), strict=True))
    assert {row["layer"]: row["alpha"] for row in diagnosis.layers} == pytest.approx(found, rel=1e-5)


def test_layers_of_a_scanned_network_are_in_the_order_of_its_blocks():
    diagnosis = farms_jax.diagnose(FLAT, axes=RULES, exclude="head/.*", **QUICK)
    blocks = [f"blocks/{name}/kernel[{i}]" for i in range(LAYERS) for name in ("query", "up")]
    assert diagnosis.column("layer") == blocks
    assert [row["layer"] for row in diagnosis.sort("alpha")._by_depth()] == blocks


def test_single_layers_are_included_and_excluded():
    settings = {"axes": RULES, "include": r"blocks/up/.*", "exclude": r".*\[1\]", **QUICK}
    diagnosis = farms_jax.diagnose(FLAT, **settings)
    assert diagnosis.column("layer") == ["blocks/up/kernel[0]", "blocks/up/kernel[2]"]
    assert dict(diagnosis.left_out)["blocks/up/kernel[1]"] == "excluded"


def test_stacks_are_declared_beside_the_axes():
    """As in `analyze`, and kept in the settings."""
    declared = {"axes": {r".*/query/kernel": "IOO", "head/kernel": None}, "stack": {r"blocks/.*": 1}}
    diagnosis = farms_jax.diagnose(FLAT, **declared, **QUICK)
    assert set(diagnosis.column("layer")) == set(dict(one_by_one())) - {"head/kernel"}
    assert diagnosis.settings["axes"] == {r".*/query/kernel": "IOO", "head/kernel": "none"}
    assert diagnosis.settings["stack"] == {r"blocks/.*": 1}
    assert len(farms_jax.compare(FLAT, FLAT, **declared, **QUICK).layers) == 6


def test_optimiser_states_of_other_ranks_are_not_what_is_declared(tmp_path):
    tensors = {f"params/{name}": leaf for name, leaf in FLAT.items()}
    tensors |= {f"opt_state/v_row/{name}": np.zeros(leaf.shape[:1], "f") for name, leaf in FLAT.items()}
    np.savez(tmp_path / "model.npz", **tensors)
    rules = AxisRules({r".*/query/kernel": "IOO"}, stack={r".*blocks/.*": 1})
    diagnosis = farms_jax.diagnose(tmp_path / "model.npz", axes=rules, exclude=r"opt_state/.*", **QUICK)
    assert len(diagnosis.layers) == 7
    assert dict(diagnosis.left_out)["opt_state/v_row/head/kernel"] == "optimiser state"


def test_experts_in_one_tensor_are_layers(tmp_path):
    experts = RNG.standard_normal((2, 48, 32)).astype("f")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    safetensors.numpy.save_file({name: experts, f"{name}_bias": np.ones((2, 48), "f")}, tmp_path / "m.safetensors")
    diagnosis = farms_jax.diagnose(tmp_path / "m.safetensors", **QUICK)
    assert diagnosis.column("layer") == [f"{name}[0]", f"{name}[1]"]
    alone = farms_jax.diagnose({"w": experts[1]}, axes=farms_jax.TORCH_AXES, **QUICK)
    assert diagnosis.column("alpha")[1] == alone.column("alpha")[0]


def test_a_function_of_the_parameters_sees_their_modules():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential([eqx.nn.Conv1d(16, 24, 3, key=jax.random.key(0)), eqx.nn.LayerNorm((8, 24))])
    diagnosis = farms_jax.diagnose(model, axes=axis_rules.equinox, **QUICK)
    assert diagnosis.column("layer") == ["layers/0/weight"]
    wanted = farms_jax.analyze(model, axes={".*0/weight": "OIK", ".*1/weight": None})
    assert diagnosis.column("alpha") == pytest.approx(np.asarray(wanted.alpha).tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*of the weights are left out")
def test_a_file_adds_to_what_the_format_knows(tmp_path):
    """Experts are recognised, outputs come first; a default of its own stands for itself alone."""
    tensors = {
        "model.layers.0.mlp.experts.up_proj": RNG.standard_normal((2, 48, 32)).astype("f"),
        "opt_state.mlp.experts.up_proj": np.ones((2, 48, 32), "f"),
        "kernels": RNG.standard_normal((32, 3, 40)).astype("f"),
        "head.weight": RNG.standard_normal((40, 32)).astype("f"),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    declared = '[axes]\nkernels = "IO"\n[stack]\nkernels = 1\n'
    names = {}
    for default in ("", 'default = "torch"\n'):
        (tmp_path / "axes.toml").write_text(default + declared)
        rules = axis_rules.read_rules(tmp_path / "axes.toml")
        with farms_jax.open_weights(tmp_path / "model.safetensors", axes=rules) as source:
            assert source.axes.default == farms_jax.TORCH_AXES
            names[default] = set(farms_jax.diagnose(source, **QUICK).names)
    experts = {f"model.layers.0.mlp.experts.up_proj[{i}]" for i in range(2)}
    assert names[""] == {*experts, "kernels[0]", "kernels[1]", "kernels[2]", "head.weight"}
    assert names['default = "torch"\n'] == names[""] - experts


def test_what_moved_is_said_layer_by_layer():
    moved = FLAT | {"blocks/up/kernel": FLAT["blocks/up/kernel"] * np.array([1, 2, 1], "f")[:, None]}
    comparison = farms_jax.compare(FLAT, moved, axes=RULES, **QUICK)
    found = {row["layer"]: row["moved"] for row in comparison.layers}
    assert found.pop("blocks/up/kernel[1]") == pytest.approx(1)
    assert set(found.values()) == {0.0}


def test_the_command_takes_a_declaration_from_a_file(farms, tmp_path):
    np.savez(tmp_path / "model.npz", **FLAT)
    (tmp_path / "axes.toml").write_text(DECLARED)
    (tmp_path / "axes.json").write_text(json.dumps({"axes": {".*/query/kernel": "IOO"}, "stack": {"blocks/.*": [1]}}))
    for kind in ("toml", "json"):
        told = farms("analyze", tmp_path / "model.npz", "--axes", tmp_path / f"axes.{kind}", "--explain")
        assert "3 layers, each a layer" in told
        assert "7 layers of 4 arrays" in told
    command = "analyze", tmp_path / "model.npz", "--axes", tmp_path / "axes.toml", "--json", tmp_path / "d.json"
    farms(*command, "--resamples", 0, "--no-randomize")
    diagnosis = farms_jax.Diagnosis.read_json(tmp_path / "d.json")
    assert len(diagnosis.layers) == 7


@pytest.mark.parametrize("name", axis_rules.NAMED)
def test_every_name_stands_for_rules(name):
    rules = axis_rules.NAMED[name]
    assert isinstance(rules(FLAT) if callable(rules) else rules, AxisRules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[axes]\n".*/key/kernel" = "IO"', "axes: '.*/key/kernel' matches no name as a whole; names are: blocks/query"),
        ('[axes]\n".*/query/kernel" = "IO"', "'IO', given for blocks/query/kernel, spells 2 axes; it has 4: "),
        ('[stack]\n"(" = 0', "stack: '(' is not a regular expression"),
        ('[stack]\n"blocks/.*" = 3', "stack: blocks/up/kernel has no axis 3; its shape is (32, 3, 48)"),
    ],
)
def test_a_declaration_that_does_not_fit_is_one_line_that_names_its_file(farms, tmp_path, capsys, text, message):
    np.savez(tmp_path / "model.npz", **{name: leaf for name, leaf in FLAT.items() if "bias" not in name})
    (tmp_path / "axes.toml").write_text(text)
    with pytest.raises(SystemExit):
        farms("analyze", tmp_path / "model.npz", "--axes", tmp_path / "axes.toml")
    told = capsys.readouterr().err
    assert f"{tmp_path / 'axes.toml'}: " in told
    assert message in told
    assert told.count("\n") == 1


def test_what_is_left_out_for_want_of_a_declaration_is_told_once_with_the_flag(farms, tmp_path):
    for name in ("model", "later"):
        np.savez(tmp_path / f"{name}.npz", **FLAT)
    told = farms("compare", tmp_path / "model.npz", tmp_path / "later.npz", "--resamples", 0, "--no-randomize")
    assert told.count("of the weights are left out") == 1
    assert "say it with --axes NAME or --axes FILE, or leave them out with --exclude" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes = 3", "axes must be a table with patterns as its keys"),
        ("[layout]\na = 1", "'layout' is not known; it may have the tables `axes` and `stack`, and `default`"),
        ("default = 'keras'", "default must be 'flax' or 'torch'"),
        ("[axes]\nw = 2", "axes.w must be letters"),
        ("[stack]\nw = 'first'", "stack.w must be an axis or a list of axes"),
        ("not toml", "no TOML or JSON file of axes"),
    ],
)
def test_a_file_that_is_no_declaration_is_named(tmp_path, text, message):
    (tmp_path / "axes.toml").write_text(text)
    with pytest.raises(InputError, match="axes.toml: ") as error:
        axis_rules.read_rules(tmp_path / "axes.toml")
    assert message in str(error.value)
