"""DPOT's checkpoints: converted exactly, and every fault told in one message."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from farms_jax import named_leaves
from farms_jax.errors import InputError
from sciml import convert
from sciml.checkpoints import fitting_name, from_torch, infer_config, load, read, save, to_torch
from sciml.conversion import COMPONENTS, component_of
from sciml.model import NAMED, make_network
from tests.dpot_helpers import SETTINGS, SMALL, arrays_of, compiled, config_of, state_of, write_state

NORMALISED = dataclasses.replace(SMALL, normalize=True)


def skeleton_of(config):
    return jax.eval_shape(make_network(config).init, jax.random.key(0))


def ones(config):
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), skeleton_of(config))


@pytest.fixture(scope="module")
def state():
    """State dict of NORMALISED, all ones."""
    return to_torch(ones(NORMALISED), NORMALISED)


def replaced(params):
    """Which components are ones, as in the checkpoint; all others are zeros."""
    ones, zeros = (
        {component_of(name) for name, leaf in named_leaves(params) if np.allclose(leaf, value)} for value in (1, 0)
    )
    assert not ones & zeros
    return ones


def test_a_converted_checkpoint_gives_the_references_output(tmp_path):
    name = "dpot_p2_modes8_norm"
    config, arrays = config_of(name), arrays_of(name)
    source = write_state(tmp_path / "torch.safetensors", {f"module.{k}": v for k, v in state_of(name).items()})
    text = convert.convert(source, tmp_path / "ours.safetensors")
    assert f"{sum(v.size for v in state_of(name).values()):,} parameters" in text
    assert "fits none of the named models" in text
    params, notes = load(tmp_path / "ours.safetensors", config, skeleton_of(config))
    # Their file does not say how many modes were kept.
    assert notes == ["modes: the checkpoint was trained with 32, the model has 8"]
    y, _ = compiled(jax.jit(make_network(config).apply), params, arrays["x"])(params, arrays["x"])
    np.testing.assert_allclose(y, arrays["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_files_are_torchs_and_have_the_configuration(tmp_path, name):
    config = config_of(name)
    save(tmp_path / "model.safetensors", from_torch(state_of(name), config), config)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["config"]) == dataclasses.asdict(config)
        assert set(file.keys()) == set(state_of(name))
        for key, value in state_of(name).items():
            np.testing.assert_array_equal(file.get_tensor(key), value, err_msg=key)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    params = ones(SMALL)
    params["pos_embed"] = params["pos_embed"][:2]
    with pytest.raises(InputError, match=r"pos_embed is \[2, 4, 16\], must be \[4, 4, 16\]"):
        save(path, params, SMALL)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("chosen", [(name,) for name in COMPONENTS] + [("blocks", "pos", "time_agg"), ("all",)])
def test_only_chosen_components_are_replaced(tmp_path, state, chosen):
    zeros = jax.tree.map(np.zeros_like, ones(NORMALISED))
    path = write_state(tmp_path / "m.safetensors", state)
    params, notes = load(path, NORMALISED, zeros, chosen)
    assert notes == []
    assert jax.tree.structure(params) == jax.tree.structure(zeros)
    assert replaced(params) == set(COMPONENTS if chosen == ("all",) else chosen)


@pytest.mark.parametrize(
    ("row", "resized"), [([0, 1], [0, 0.25, 0.75, 1]), ([0, 1, 2, 3, 4, 5, 6, 9], [0.5, 2.5, 4.5, 7.5])]
)
def test_positions_of_another_resolution(tmp_path, state, row, resized):
    row = np.asarray(row, np.float32)
    positions = np.broadcast_to(row[:, None] + 10 * row, (1, 16, len(row), len(row)))
    path = write_state(tmp_path / "m.safetensors", {**state, "pos_embed": positions})
    params, notes = load(path, NORMALISED, ones(NORMALISED))
    assert notes == [f"position embedding interpolated from {len(row)} x {len(row)} to 4 x 4 patches"]
    expected = np.add.outer(resized, 10 * np.asarray(resized))
    np.testing.assert_allclose(params["pos_embed"], np.repeat(expected[:, :, None], 16, axis=2), atol=1e-5)


def test_all_faults_are_told_at_once(state):
    state = {**state, "cls_head.2.bias": np.ones(3), "head.weight": np.ones(2), "blocks.2.norm1.weight": np.ones(16)}
    del state["time_agg_layer.gamma"]
    with pytest.raises(InputError) as error:
        from_torch(state, NORMALISED)
    for fault in (
        "unexpected: head.weight [2]",
        "3 blocks, the model has 2",
        "unexpected: blocks.2.norm1.weight",
        "missing: time_agg_layer.gamma",
        "cls_head.2.bias is [3], must be [16]",
        "Use the configuration that it was saved from",
    ):
        assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "components"),
    [
        ({"in_steps": 4}, {"time_agg"}),
        ({"in_channels": 3, "out_channels": 3}, {"patch_embed", "scale_feats", "out"}),
        ({"num_classes": 5}, {"cls_head"}),
        ({"depth": 3}, {"blocks"}),
        ({"normalize": False}, {"scale_feats"}),
        ({"patch_size": 4}, {"patch_embed", "out"}),  # the positions are resized
    ],
)
def test_faults_name_the_components_to_leave_out(tmp_path, state, change, components):
    config = dataclasses.replace(NORMALISED, **change)
    path = write_state(tmp_path / "m.safetensors", state)
    zeros = jax.tree.map(np.zeros_like, ones(config))
    with pytest.raises(InputError) as error:
        load(path, config, zeros)
    rest = [component for component in COMPONENTS if component not in components]
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith(f"leave out {', '.join(sorted(components))}: components {' '.join(rest)}")
    params, _ = load(path, config, zeros, tuple(rest))
    assert replaced(params) == set(rest)


def test_a_checkpoint_of_another_width(tmp_path, state):
    config = dataclasses.replace(NORMALISED, width=32)
    with pytest.raises(InputError, match="Use the model that it is of, or another checkpoint$"):
        load(write_state(tmp_path / "m.safetensors", state), config, skeleton_of(config))


def test_a_named_model_is_named(tmp_path):
    tiny = to_torch(ones(NAMED["tiny"]), NAMED["tiny"])
    assert fitting_name(tiny) == "tiny"
    assert infer_config(tiny) == NAMED["tiny"]
    assert fitting_name({**tiny, "cls_head.4.bias": np.ones(5)}) is None
    with pytest.raises(InputError, match="It is a checkpoint of the model tiny: use that"):
        load(write_state(tmp_path / "m.safetensors", tiny), SMALL, ones(SMALL))


def test_inferred_configurations():
    for name in SETTINGS:
        config = config_of(name)
        found = infer_config(state_of(name))
        assert dataclasses.replace(found, modes=config.modes, activation=config.activation) == config
    with pytest.raises(InputError, match="not of a DPOT model"):
        infer_config({"conv1.weight": np.ones((3, 3))})


@pytest.mark.parametrize(
    ("config", "components", "message"),
    [
        (NORMALISED, ("patch",), "component 'patch': unknown; choose from all, patch_embed, pos, blocks, scale_feats"),
        (NORMALISED, (), "components: none given; choose from all, patch_embed"),
        (NORMALISED, ("blocks", "time_agg"), "component time_agg: .*m.safetensors has none; leave it out"),
        (SMALL, ("blocks", "scale_feats"), "component scale_feats: the model has none; leave it out"),
    ],
)
def test_components_that_cannot_be_loaded(tmp_path, state, config, components, message):
    partial = {name: value for name, value in state.items() if not name.startswith("time_agg")}
    path = write_state(tmp_path / "m.safetensors", partial)
    with pytest.raises(InputError, match=message):
        load(path, config, ones(config), components)


def test_metadata_that_are_no_configuration_say_nothing(tmp_path, state):
    for text in ("[" * 100_000, "{", '{"modes": "a\\nb"}'):
        save_file(state, path := tmp_path / "m.safetensors", {"config": text})
        _, notes = load(path, NORMALISED, ones(NORMALISED))
        assert all(note.isprintable() for note in notes)


def test_files_that_cannot_be_read(tmp_path, state):
    infinite = state["time_agg_layer.w"].copy()
    infinite[1, 2, 3] = -np.inf
    changes = {
        r"time_agg_layer\.w has values that are NaN or infinite": {"time_agg_layer.w": infinite},
        r"a tensor is called 'two\\nlines', which is no name": {"two\nlines": np.ones(3, np.float32)},
    }
    for message, change in changes.items():
        path = write_state(tmp_path / "m.safetensors", state | change)
        with pytest.raises(InputError, match=rf"m\.safetensors: {message}"):
            read(path)
    content = path.read_bytes()
    for keep in (0, 100, -1):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"m\.safetensors: .*truncated.*; download it again"):
            read(path)
    (tmp_path / "m.h5").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (("m.h5", "not a kind of checkpoint"), ("folder.safetensors", "no such file")):
        with pytest.raises(InputError, match=f"{name}: {message}.*safetensors or .pth"):
            read(tmp_path / name)


def test_half_precision_is_read(tmp_path, state):
    half = {name: value.astype(np.float16) for name, value in state.items()}
    found = read(write_state(tmp_path / "m.safetensors", half))
    assert found.keys() == state.keys()
    assert all(value.dtype == np.float32 and (value == 1).all() for value in found.values())


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import now fails
    (tmp_path / "m.pth").write_bytes(b"x")
    monkeypatch.setattr(sys, "argv", ["sciml.convert", str(tmp_path / "m.pth")])
    with pytest.raises(SystemExit) as stopped:
        convert.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert 'm.pth: saved by torch, which is not installed: pip install "farms-jax[torch]"' in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_convert_writes_over_nothing(tmp_path, state):
    path = write_state(tmp_path / "m.safetensors", state)
    content = path.read_bytes()
    for target, message in (("m.safetensors", "is the checkpoint itself"), ("m.pth", "must end in")):
        with pytest.raises(InputError, match=message):
            convert.convert(path, tmp_path / target)
    assert path.read_bytes() == content
