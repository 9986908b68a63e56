"""Shared by the tests of DPOT: the reference's models (`data/dpot_tiny.*`), a small one of ours, a file of fields."""

import functools
import json
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import save_file

from sciml.model import ModelConfig

DATA = Path(__file__).parent / "data"
NAMES = {
    "img_size": "image_size",
    "in_timesteps": "in_steps",
    "out_timesteps": "out_steps",
    "embed_dim": "width",
    "n_blocks": "num_blocks",
    "out_layer_dim": "out_width",
    "n_cls": "num_classes",
    "act": "activation",
    "time_agg": "time_aggregation",
}
SETTINGS = {model["name"]: model for model in json.loads((DATA / "dpot_tiny.json").read_text())["models"]}
SMALL = ModelConfig(image_size=8, patch_size=2, in_steps=3, width=16, depth=2, num_blocks=2, modes=3, out_width=8)


def config_of(name):
    """Our configuration of a reference model."""
    settings = SETTINGS[name]["config"]
    return ModelConfig(**{NAMES.get(key, key): value for key, value in settings.items() if key != "mixing_type"})


@functools.cache
def arrays_of(name):
    """Everything stored of a reference model, without its name in front."""
    with np.load(DATA / "dpot_tiny.npz") as file:
        return {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}


def below(prefix, arrays):
    """The arrays whose names start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def state_of(name):
    """State dict of a reference model."""
    return below("state/", arrays_of(name))


def compiled(jitted, *arguments):
    """A compiled function of such arguments, not optimised: compiling takes the time of these tests, running none."""
    return jitted.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})


def write_state(path, state):
    """Write a state dict as Torch's users do: without a word on the model."""
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
    return path


def write_fields(path, count=10, steps=13, size=8, seed=0):
    """A file in PDEBench's published layout: waves that travel."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 2 * np.pi, size, endpoint=False)
    time, phase = np.arange(steps) * 0.3, rng.uniform(0, 6, (count, 4, 1, 1, 1))
    waves = np.sin(x[:, None] - time[:, None, None] + phase) * np.cos(x[None, :] + phase)  # (N, 4, T, X, Y)
    with h5py.File(path, "w") as file:
        for channel, (name, base) in enumerate({"Vx": 0, "Vy": 0, "density": 2, "pressure": 5}.items()):
            file[name] = (base + waves[:, channel]).astype(np.float32)
        file["t-coordinate"] = np.arange(steps + 1, dtype=np.float32)
        for name in ("x-coordinate", "y-coordinate"):
            file[name] = x.astype(np.float32)
    return path
