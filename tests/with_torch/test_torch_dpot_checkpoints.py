"""DPOT checkpoints as Torch writes them: read, converted, and code in them never run."""

import argparse
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from farms_jax.errors import InputError
from sciml import convert
from sciml.checkpoints import from_torch, load, read
from tests.dpot_helpers import config_of, state_of, write_state

NAME = "dpot_p2_modes8_norm"


class Payload:
    """What creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def tensors():
    return {name: torch.from_numpy(value) for name, value in state_of(NAME).items()}


def test_torch_files_are_read(tmp_path):
    parallel = {f"module.{name}": value for name, value in tensors().items()}
    # As the reference's training saves it.
    saved = {"args": argparse.Namespace(lr=0.1, paths=["a"]), "model": parallel, "optimizer": {"step": [1]}}
    for content in (tensors(), saved):
        torch.save(content, tmp_path / "m.pth")
        state = read(tmp_path / "m.pth")
        assert state.keys() == state_of(NAME).keys()
        for name, value in state_of(NAME).items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_conversion_prints_what_it_wrote(tmp_path, capsys, monkeypatch):
    torch.save({"model": tensors()}, tmp_path / "m.pth")
    monkeypatch.setattr(sys, "argv", ["sciml.convert", str(tmp_path / "m.pth")])
    convert.main()
    output = capsys.readouterr().out
    assert output.startswith(
        f"{tmp_path / 'm.safetensors'}: {sum(v.size for v in state_of(NAME).values()):,} parameters"
    )
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path, legacy):
    path, victim = tmp_path / "m.pth", tmp_path / "created"
    content = {"model": tensors(), "args": Payload(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(path) != legacy
    assert read(path).keys() == state_of(NAME).keys()
    assert not victim.exists()
    # The payload works where nobody looks.
    pickle.loads(pickle.dumps(Payload(victim))).close()
    assert victim.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -1000])
def test_damaged_torch_files(tmp_path, keep):
    path = tmp_path / "m.pth"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"m\.pth: .*damaged"):
        read(path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"model": {"w": 3}}, {"epoch": 3}])
def test_torch_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"m\.pth: holds no state dict"):
        read(tmp_path / "m.pth")


@pytest.mark.parametrize("size", [4, 7, 31])
def test_positions_are_interpolated_as_by_torch(tmp_path, size):
    config = config_of(NAME)
    positions = torch.randn(1, 32, size, size, generator=torch.Generator().manual_seed(0))
    path = write_state(tmp_path / "m.safetensors", {**state_of(NAME), "pos_embed": positions.numpy()})
    params, _ = load(path, config, from_torch(state_of(NAME), config), ("pos",))
    expected = torch.nn.functional.interpolate(positions, size=(16, 16), mode="bilinear")
    np.testing.assert_allclose(params["pos_embed"], expected[0].permute(1, 2, 0), atol=1e-6)
