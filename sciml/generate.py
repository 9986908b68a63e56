"""Make a data set of two-dimensional compressible flows, laid out and named as PDEBench's published files are.

python -m sciml.generate --mach 0.1 --eta 0.01 --zeta 0.01 --size 64 --count 100 --out data

Stopped or killed, the same command goes on. A trajectory depends on the seed and its index alone.

The published files were made with the equations' viscosities times the local density ("not realistic viscosity but
fast to calculate", says PDEBench's CFD_multi_Hydra.py) and without the part of the stress that couples the axes. Here
the equations are solved as published, so that thin gas, of density 0.1, is a hundred times more viscous than dense.
"""

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.generate", extra="sciml")

import contextlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import tyro
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.command_line import usage
from farms_jax.programs.exits import reported
from farms_jax.programs.files import atomic, reserve, write_json
from farms_jax.programs.locking import locked

from .flow_config import FlowConfig, file_name
from .hdf5 import CHANNELS
from .shards import make_shards, ranges, read_shard, shard_path

_OUT = tyro.conf.arg(help="folder for the file, which gets the name that PDEBench would give it.")
_CHUNK = 2**18  # most bytes of a chunk of the file, unless one state takes more


def generate(path: Path, config: FlowConfig) -> Path:
    """Return the path of a file of trajectories, which is made unless it is complete already.

    Datasets `Vx`, `Vy`, `density` and `pressure` of shape (trajectory, time, x, y), and `t-coordinate` (steps + 1: the
    published files have the time after the last one too), `x-coordinate` and `y-coordinate` (cell centres), all
    float32. Attributes: the settings, and `redraws`, how often an initial state was drawn anew because density or
    pressure did not stay positive. The four fields are in chunks with checksums (Fletcher-32), which every reader of
    HDF5 verifies.

    Until the file is complete, finished trajectories lie in the folder PATH.parts; a later call goes on from there, and
    computes again what is damaged. One process at a time works in the folder.

    Raises:
        InputError: a setting is out of its range, the file or folder has other settings, another process is making it,
            the disk is too full, or more than one in ten flows did not stay positive.
    """
    config.check()
    parts = path.with_name(f"{path.name}.parts")
    if _is_made(path, config):
        shutil.rmtree(parts, ignore_errors=True)  # left by a kill between the file's end and this removal
        return path
    _check_space(path, parts, config)
    try:
        with locked(parts):
            if not _is_made(path, config):  # another process may have made it meanwhile
                _check_begun(parts, config)
                make_shards(parts, config)
                _merge(path, parts, config)
            shutil.rmtree(parts, ignore_errors=True)  # with the lock: whoever comes now finds the file
    except OSError as error:
        remedy = "free space, or choose another folder; the same command goes on"
        raise InputError(f"{error.filename or path}: {error.strerror or error}; {remedy}") from error
    return path


def _is_made(path: Path, config: FlowConfig) -> bool:
    """Return whether the file is complete; raise an InputError if it has other settings."""
    if not path.exists():
        return False
    attributes: dict[str, Any] = {}
    with contextlib.suppress(OSError), h5py.File(path) as file:  # not an HDF5 file
        attributes = {name: np.asarray(value).item() for name, value in file.attrs.items() if np.size(value) == 1}
    _check_same(path, attributes, config, "delete it, or choose another folder")
    tqdm.write(f"{path}: made earlier with the same settings")
    return True


def _check_begun(parts: Path, config: FlowConfig) -> None:
    """Raise an InputError if the folder was begun with other settings; write them where it is new."""
    path = parts / "settings.json"
    if path.exists():
        try:
            begun = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); delete {parts} to start anew") from error
        _check_same(parts, begun, config, "go on with the settings it was begun with, or delete it")
    write_json(path, config.attributes())


def _check_same(path: Path, attributes: dict[str, Any], config: FlowConfig, remedy: str) -> None:
    """Raise an InputError if a file or folder was made with other settings."""
    if "generator_version" not in attributes:
        raise InputError(f"{path}: there is such a file, which sciml.generate has not made; {remedy}")
    wanted = config.attributes()
    differ = [
        f"{name} {attributes.get(name)}, not {value}" for name, value in wanted.items() if attributes.get(name) != value
    ]
    if differ:
        raise InputError(f"{path}: made with {'; '.join(differ)}; {remedy}")


def _check_space(path: Path, parts: Path, config: FlowConfig) -> None:
    """Raise an InputError if the disk has no room for the shards still to come and the file made of them."""
    data, total = _sizes(config)
    need = data + total - sum(shard.stat().st_size for shard in parts.glob("*.npz"))
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{path}: {need / 1e9:.1f} GB are needed on the way ({total / 1e9:.1f} GB in the end), {free / 1e9:.1f} GB "
            "are free; lower --count or --size, or choose another disk"
        )


def _sizes(config: FlowConfig) -> tuple[int, int]:
    """Return the bytes of the numbers, and a bound on those of the file, which also has records on chunks."""
    data = 4 * len(CHANNELS) * config.count * config.steps * config.size**2
    chunks = len(CHANNELS) * config.count * config.steps // _chunk(config)[1]
    return data, data + 256 * chunks + 2**16


def _chunk(config: FlowConfig) -> tuple[int, int, int, int]:
    """Return the shape of a chunk, the unit of checksums: some states of one trajectory, as readers want few."""
    # A divisor of the steps, because an incomplete chunk would take the space of a whole one.
    most = max(1, _CHUNK // (4 * config.size**2))
    states = max(states for states in range(1, min(most, config.steps) + 1) if config.steps % states == 0)
    return 1, states, config.size, config.size


def _new_file(path: Path, size: int) -> None:
    """Write an empty HDF5 file and reserve `size` bytes of disk for it, because a full disk crashes HDF5."""
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        file.flush()
        image = file.id.get_file_image()
    with path.open("wb") as file:
        file.write(image)
        file.flush()
        reserve(file.fileno(), max(size, len(image)))


def _merge(path: Path, parts: Path, config: FlowConfig) -> None:
    """Write the file from its shards, one in memory at a time."""
    shape = (config.count, config.steps, config.size, config.size)
    kind = {"dtype": np.float32, "chunks": _chunk(config), "fletcher32": True}
    times = np.arange(config.steps + 1) * (config.end / (config.steps - 1))
    centres = (np.arange(config.size) + 0.5) / config.size
    redraws = 0
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(atomic(path))
        _new_file(part, _sizes(config)[1])
        file = stack.enter_context(h5py.File(part, "r+"))  # which gives back at its end what it did not need
        for name, values in (("t-coordinate", times), ("x-coordinate", centres), ("y-coordinate", centres)):
            file.create_dataset(name, data=values.astype(np.float32))
        datasets = {name: file.create_dataset(name, shape, **kind) for name in CHANNELS}
        for shard in tqdm(ranges(config), desc="Merging", unit="shard", dynamic_ncols=True):
            content = read_shard(parts, shard, config)
            if content is None:
                raise InputError(f"{shard_path(parts, shard.start)} is damaged; the same command computes it again")
            redraws += int(content[1].sum())
            for channel, name in enumerate(CHANNELS):
                datasets[name][shard.start : shard.stop] = content[0][..., channel]
        file.attrs.update(config.attributes() | {"redraws": redraws, "generator": "farms_jax sciml.generate"})


def main(name: str = "sciml.generate") -> None:
    """Run the program, called `name` in its messages; a mistake in the settings is one line, and exit status 2."""

    def run(flow: Annotated[FlowConfig, tyro.conf.arg(name="")], out: Annotated[Path, _OUT] = Path("data")) -> Path:
        return generate(out / file_name(flow), flow)

    description = usage((__doc__ or "").partition("\n\nThe published")[0], name)
    with reported(name, "; the same command goes on"):
        print(tyro.cli(run, prog=name, description=description))
