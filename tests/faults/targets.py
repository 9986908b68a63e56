"""All that is fuzzed, by name; here the samples of fluid flows, DPOT and run directories.

Everything is imported inside functions: a process that fuzzes one reader should not wait for the others' packages.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults import model_targets, mutations, weights_targets
from tests.faults.target import Target, both, new_folder


def _hdf5(folder: Path) -> list[Path]:
    import h5py

    flows = np.random.default_rng(0).standard_normal((3, 3, 4, 5, 4), np.float32)  # N, X, Y, T, C
    paths = [folder / f"{name}.hdf5" for name in ("pdebench", "stacked", "latest", "packed")]
    with h5py.File(paths[0], "w") as file:
        for number, name in enumerate(("Vx", "Vy", "density", "pressure")):
            file.create_dataset(name, data=flows[..., number].transpose(0, 3, 1, 2))
        file["t-coordinate"] = np.linspace(0, 1, 6)
    with h5py.File(paths[1], "w") as file:
        file["data"] = flows
        file["data"].attrs["note"] = "made up"
    with h5py.File(paths[2], "w", libver="latest") as file:
        file.create_dataset("data", data=flows, chunks=(1, 3, 4, 5, 4), maxshape=(None, 3, 4, 5, 4))
    with h5py.File(paths[3], "w") as file:
        file.create_dataset(
            "data", data=flows, chunks=(1, 3, 4, 5, 4), compression="gzip", shuffle=True, fletcher32=True
        )
    scattered = new_folder(folder, "scattered")
    for number, flow in enumerate(flows[:2]):
        with h5py.File(scattered / f"data_{number}.hdf5", "w") as file:
            file["data"] = flow
    return [*paths, scattered]


def _read_fields(path: Path) -> None:
    from sciml.fields import open_fields
    from sciml.hdf5 import open_source

    source = open_source(path)
    try:
        for index in range(min(source.count, 3)):
            source.read(index, 0, source.shape[2])
    finally:
        source.close()
    data = open_fields(path, resolution=None, steps_needed=2, channels=source.shape[3])
    data.train.read(0, 0, 2)
    data.train.close()
    data.test.close()


def _dpot(folder: Path) -> list[Path]:
    import jax

    from sciml import checkpoints
    from sciml.model import ModelConfig, make_network

    config = ModelConfig(image_size=8, patch_size=2, in_steps=3, width=16, depth=1, num_blocks=2, modes=3, out_width=8)
    checkpoints.save(folder / "dpot.safetensors", make_network(config).init(jax.random.key(0)), config)
    return [folder / "dpot.safetensors"]


def _read_dpot(path: Path) -> None:
    from sciml import checkpoints

    state = checkpoints.read(path)
    config = checkpoints.infer_config(state)
    checkpoints.load(path, config, checkpoints.from_torch(state, config))


def _runs(folder: Path) -> list[Path]:
    from farms_jax.programs.config_file import write_config
    from farms_jax.programs.run_directory import LAYER_FIELDS
    from sciml.config import Config

    write_config(folder / "run", Config(against=("none",), seeds=(1, 2)), {"data": {"name": "made"}, "versions": {}})
    seed = new_folder(folder / "run", "seed0")
    (seed / "metrics.jsonl").write_text('{"epoch": 0, "loss": 0.5}\n{"epoch": 1, "loss": 0.25}\n')
    lines = [",".join(LAYER_FIELDS), "0,dense/kernel,2.5,1.0,0.1", '1,"a, b",2.5,1.0,0.1']
    (seed / "layers.csv").write_text("\r\n".join(lines) + "\r\n")
    return [folder / "run"]


def _read_run(path: Path) -> None:
    from farms_jax.programs.config_file import read_config
    from farms_jax.programs.run_directory import SeedDirectory
    from sciml.config import Config

    def lines() -> None:
        seed = SeedDirectory(path / "seed0")
        both(seed.metrics, seed.layers)

    both(lambda: read_config(path, Config), lines)


def _plain(folder: Path) -> list[Path]:
    (path := folder / "file.bin").write_bytes(bytes(20))
    return [path]


def _misbehave(path: Path) -> None:
    """Go wrong as the first byte says."""
    from farms_jax.errors import InputError

    def refuse(message: str) -> None:
        raise InputError(message)

    acts: list[Callable[[], object]] = [
        lambda: None,
        lambda: json.loads("{"),
        lambda: np.ones(3 << 23),  # 192 MiB
        lambda: np.empty(1 << 40),
        lambda: refuse("of two\nlines"),
        lambda: refuse("of one line"),
        lambda: sys.exit(3),
        os.abort,
        lambda: sum(iter(int, 1)),  # for ever
    ]
    acts[path.read_bytes()[0]]()


_RUN_FILES = {
    "config.json": mutations.mutate_json,
    "*.jsonl": mutations.mutate_json_lines,
    "*.csv": mutations.mutate_bytes,
}
TARGETS: dict[str, Target] = {
    **weights_targets.TARGETS,
    **model_targets.TARGETS,
    "hdf5": Target(1000, _hdf5, {"*": mutations.near_start(0.5)}, _read_fields),
    "dpot": Target(100, _dpot, {"*": mutations.mutate_safetensors}, _read_dpot),
    "run": Target(400, _runs, _RUN_FILES, _read_run),
    # Not a reader: a test of what the engine finds.
    "misbehaving": Target(0, _plain, {"*": lambda _, __, random: bytes([random.randrange(9)])}, _misbehave),
}
