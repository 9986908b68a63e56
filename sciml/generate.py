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
import dataclasses
import itertools
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, get_args

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.command_line import usage
from farms_jax.programs.exits import reported
from farms_jax.programs.files import atomic, reserve, write_json
from farms_jax.programs.locking import locked

from .flow import CFL, DENSITY, GAMMA, PRESSURE, VX, VY, Gas, simulate
from .initial import Kind, random_state

DATASETS = {"Vx": VX, "Vy": VY, "density": DENSITY, "pressure": PRESSURE}
SHARD = 16  # trajectories that a kill can cost, and that an accelerator computes side by side
VERSION = 1  # of the numbers: to be raised with any change to flow.py or initial.py that changes them
_CHUNK = 2**18  # bytes of a chunk of the file, at most where that is a state or more
_TRIES = 10  # redraws of one trajectory, or of one in ten, after which the settings are at fault
_LEAST_SIZE = 16  # four cells for the shortest wave
_UNSTABLE = "density or pressure does not stay positive: {}; lower --mach, or raise --eta and --zeta, or --size"

Solver = Callable[[np.ndarray, np.ndarray], Array]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """What the trajectories are."""

    mach: float = 0.1
    """Mach number: mean modulus of the velocity over the speed of sound at the start."""
    eta: float = 0.01
    """Shear viscosity."""
    zeta: float = 0.01
    """Bulk viscosity."""
    initial: Kind = "rand"
    """Initial states: rand (waves in velocity, density, pressure) or turb (waves in velocity, without divergence)."""
    size: int = 128
    """Cells along each axis of the unit square."""
    steps: int = 21
    """States stored of each trajectory, the initial one among them."""
    end: float = 1.0
    """Time of the last state; the first is at 0."""
    count: int = 1000
    """Number of trajectories."""
    seed: int = 0
    """Of the initial states."""

    def check(self) -> None:
        """Raise an InputError if a setting is out of its range."""
        positive = {"mach": self.mach, "end": self.end}
        wrong = [
            f"--{name} must be a number > 0, got {value}" for name, value in positive.items() if not 0 < value < np.inf
        ]
        viscosities = {"eta": self.eta, "zeta": self.zeta}
        wrong += [
            f"--{name} must be a number >= 0, got {value}"
            for name, value in viscosities.items()
            if not 0 <= value < np.inf
        ]
        least = {"size": _LEAST_SIZE, "steps": 2, "count": 1, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                wrong.append(f"--{name} must be an integer >= {lowest}, got {getattr(self, name)}")
        if self.seed >= 2**32:
            wrong.append(f"--seed must be below 2**32, got {self.seed}")
        if self.initial not in get_args(Kind):
            wrong.append(f"--initial must be one of {', '.join(get_args(Kind))}, got {self.initial!r}")
        if wrong:
            raise InputError("; ".join(wrong))

    def attributes(self) -> dict[str, Any]:
        """Return all that the numbers depend on, as attributes of the file: `eta`, `zeta` and `M` as published."""
        settings = dataclasses.asdict(self)
        return {"M": settings.pop("mach"), **settings, "gamma": GAMMA, "cfl": CFL, "generator_version": VERSION}


def file_name(config: FlowConfig) -> str:
    """Return a file name as PDEBench's.

    >>> file_name(FlowConfig())
    '2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5'
    """
    flow = f"M{float(config.mach)}_Eta{float(config.eta)}_Zeta{float(config.zeta)}"
    return f"2D_CFD_{config.initial.capitalize()}_{flow}_periodic_{config.size}_Train.hdf5"


def generate(path: Path, config: FlowConfig) -> Path:
    """Make a file of trajectories, or find it made.

    Datasets `Vx`, `Vy`, `density` and `pressure` of shape (trajectory, time, x, y), and `t-coordinate` (steps + 1: the
    published files have the time after the last one too), `x-coordinate` and `y-coordinate` (cell centres), all
    float32. Attributes: the settings, and `redraws`, how often an initial state was drawn anew because density or
    pressure did not stay positive. The four fields are in chunks with checksums (Fletcher-32), which every reader of
    HDF5 looks at.

    Until it is whole, finished trajectories lie in a folder beside it, PATH.parts; a later call goes on from there,
    and computes again what is damaged. The folder is of one process at a time.

    Args:
        path: where the file will be.
        config: what the trajectories are.

    Returns:
        `path`.

    Raises:
        InputError: a setting is out of its range, there is a file of other settings, another process is making it, the
            disk is too full, or more than one in ten flows did not stay positive.
    """
    config.check()
    parts = path.with_name(f"{path.name}.parts")
    if _is_made(path, config):
        shutil.rmtree(parts, ignore_errors=True)  # of a program killed between the two
        return path
    _check_space(path, parts, config)
    try:
        with locked(parts):
            if not _is_made(path, config):  # by another process meanwhile
                _check_begun(parts, config)
                _make_shards(parts, config)
                _merge(path, parts, config)
            shutil.rmtree(parts, ignore_errors=True)  # with the lock: whoever comes now finds the file
    except OSError as error:
        remedy = "free space, or choose another folder; the same command goes on"
        raise InputError(f"{error.filename or path}: {error.strerror or error}; {remedy}") from error
    return path


def _is_made(path: Path, config: FlowConfig) -> bool:
    """Return whether there is the file; raise an InputError if it is of other settings."""
    if not path.exists():
        return False
    _check_same(path, _read_attributes(path), config, "delete it, or choose another folder")
    tqdm.write(f"{path}: made earlier with the same settings")
    return True


def _check_begun(parts: Path, config: FlowConfig) -> None:
    """Raise an InputError if the folder is of other settings; write them where it is new."""
    path = parts / "settings.json"
    if path.exists():
        try:
            begun = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); delete {parts} to start anew") from error
        _check_same(parts, begun, config, "go on with the settings it was begun with, or delete it")
    write_json(path, config.attributes())


def _read_attributes(path: Path) -> dict[str, Any]:
    """Read a file's attributes; none if it is no HDF5 file."""
    try:
        with h5py.File(path) as file:
            return {name: np.asarray(value).item() for name, value in file.attrs.items() if np.size(value) == 1}
    except OSError:
        return {}


def _check_same(path: Path, attributes: dict[str, Any], config: FlowConfig, remedy: str) -> None:
    """Raise an InputError if what is there was made with other settings."""
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
    total = _file_size(config)
    need = _data_size(config) + total - sum(shard.stat().st_size for shard in parts.glob("*.npz"))
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        numbers = (
            f"{need / 1e9:.1f} GB are needed on the way ({total / 1e9:.1f} GB in the end), {free / 1e9:.1f} GB are free"
        )
        raise InputError(f"{path}: {numbers}; lower --count or --size, or choose another disk")


def _solver(config: FlowConfig, lanes: int) -> Solver:
    """Compile the way from indices and attempts, uint32 of shape (lanes,), to fields (lanes, T, X, Y, 4)."""
    times = jnp.linspace(0, config.end, config.steps)

    def solve(index: Array, attempt: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), index), attempt)
        return simulate(
            random_state(key, config.size, config.mach, config.initial), Gas(config.eta, config.zeta), times
        )

    def alone(index: Array, attempt: Array) -> Array:
        return solve(index[0], attempt[0])[None]

    number = jax.ShapeDtypeStruct((lanes,), jnp.uint32)
    return jax.jit(alone if lanes == 1 else jax.vmap(solve)).lower(number, number).compile()


def _draw(solve: Solver, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute trajectories, from other initial states where density or pressure does not stay positive.

    Args:
        solve: from `_solver`.
        indices: uint32, shape (lanes,).

    Returns:
        Fields, float32, shape (lanes, T, X, Y, 4), and redraws of each, shape (lanes,).

    Raises:
        InputError: a trajectory was redrawn too often.
    """
    attempts = np.zeros_like(indices)
    fields = np.asarray(solve(indices, attempts), np.float32)
    while (failed := ~_stays_positive(fields)).any():
        attempts += failed
        if attempts.max() > _TRIES:
            raise InputError(_UNSTABLE.format(f"flow {indices[attempts.argmax()]} failed {attempts.max()} times"))
        again = np.asarray(solve(indices, attempts), np.float32)
        fields = np.where(failed[:, None, None, None, None], again, fields)
    return fields, attempts


def _stays_positive(fields: np.ndarray) -> np.ndarray:
    """Return whether all is finite, and density and pressure positive, (N, T, X, Y, 4) -> (N,)."""
    axes = (1, 2, 3, 4)
    return np.all(np.isfinite(fields), axes) & np.all(fields[..., DENSITY:] > 0, axes)


def _make_shards(parts: Path, config: FlowConfig) -> None:
    """Compute the shards that are missing: START.npz with `fields` (n, T, X, Y, 4) float32 and `redraws` (n,)."""
    shards = [range(start, min(start + SHARD, config.count)) for start in range(0, config.count, SHARD)]
    whole = _whole_shards(parts, shards, config)
    missing = [shard for shard in shards if shard not in whole]
    indices = [index for shard in missing for index in shard]
    if not indices:
        return
    bar = tqdm(total=config.count, initial=config.count - len(indices), desc="Flows", unit="flow", dynamic_ncols=True)
    total = 0
    # Closed: after an error or a stop, flows that no thread has begun are not computed.
    with bar, contextlib.closing(_results(config, indices)) as results:
        for shard in missing:
            fields, redraws = [], []
            for trajectory, attempts in itertools.islice(results, len(shard)):
                fields.append(trajectory)
                redraws.append(attempts)
                bar.update()
            total += sum(redraws)
            if total > max(_TRIES, config.count // 10):
                raise InputError(_UNSTABLE.format(f"{total} of {bar.n + total} flows failed"))
            with atomic(_shard_path(parts, shard.start)) as part, part.open("wb") as file:
                np.savez(file, fields=np.stack(fields), redraws=redraws)


def _shard_path(parts: Path, start: int) -> Path:
    return parts / f"{start:07d}.npz"


def _whole_shards(parts: Path, shards: list[range], config: FlowConfig) -> list[range]:
    """Return the shards that an earlier process computed and that are as it wrote them."""
    there = [shard for shard in shards if _shard_path(parts, shard.start).exists()]
    whole = []
    for shard in tqdm(there, desc="Checking", unit="shard", leave=False, disable=not there):
        if _read_shard(parts, shard, config) is not None:
            whole.append(shard)
        else:
            tqdm.write(f"{_shard_path(parts, shard.start)} is damaged and computed again", file=sys.stderr)
    return whole


def _read_shard(parts: Path, shard: range, config: FlowConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """Read fields and redraws; `None` if they are damaged, which the archive's own CRC-32 of each tells."""
    shape = (len(shard), config.steps, config.size, config.size, len(DATASETS))
    path = _shard_path(parts, shard.start)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # NumPy alone would not see damage to an array's shape
                return None
        with np.load(path, allow_pickle=False) as file:
            fields, redraws = file["fields"], file["redraws"]
    # What a damaged zip archive comes to: RuntimeError where a flag of it says that it is encrypted.
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return (fields, redraws) if fields.shape == shape and redraws.shape == shape[:1] else None


def _results(config: FlowConfig, indices: list[int]) -> Generator[tuple[np.ndarray, int]]:
    """Yield trajectories and their redraws in the order of `indices`.

    A CPU computes one per core, each in a thread of its own: `jax.vmap`, where all wait for the one with the shortest
    steps, takes three times as long, and so the numbers cannot depend on the neighbours. An accelerator needs many at
    a time to be busy.
    """
    on_cpu = jax.default_backend() == "cpu"
    lanes = 1 if on_cpu else SHARD
    threads = (os.cpu_count() or 1) if on_cpu else 1
    solve = _solver(config, lanes)
    # The last batch is filled up with its last index: one shape, one compilation.
    batches = [indices[start : start + lanes] for start in range(0, len(indices), lanes)]
    full = [np.array(batch + batch[-1:] * (lanes - len(batch)), np.uint32) for batch in batches]
    pool = ThreadPoolExecutor(threads)
    try:
        for batch, (fields, redraws) in zip(batches, pool.map(lambda batch: _draw(solve, batch), full), strict=True):
            for lane in range(len(batch)):
                yield fields[lane], int(redraws[lane])
    finally:  # whoever stops this does not wait for flows that are being computed, which can take minutes
        pool.shutdown(wait=False, cancel_futures=True)


def _chunk(config: FlowConfig) -> tuple[int, int, int, int]:
    """Part of a dataset with a checksum of its own: some states of one trajectory, since readers want a few of them."""
    # A divisor of the steps, because an incomplete chunk would take the space of a whole one.
    most = max(1, _CHUNK // (4 * config.size**2))
    states = max(states for states in range(1, min(most, config.steps) + 1) if config.steps % states == 0)
    return 1, states, config.size, config.size


def _file_size(config: FlowConfig) -> int:
    """Most bytes that the file can take: its numbers, and what HDF5 keeps for each chunk and of the datasets."""
    chunks = len(DATASETS) * config.count * config.steps // _chunk(config)[1]
    return _data_size(config) + 256 * chunks + 2**16


def _data_size(config: FlowConfig) -> int:
    return 4 * len(DATASETS) * config.count * config.steps * config.size**2


def _new_file(path: Path, size: int) -> None:
    """Write an HDF5 file without content that has the disk space for so many bytes: a full disk crashes HDF5."""
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
        _new_file(part, _file_size(config))
        file = stack.enter_context(h5py.File(part, "r+"))  # which gives back at its end what it did not need
        for name, values in (("t-coordinate", times), ("x-coordinate", centres), ("y-coordinate", centres)):
            file.create_dataset(name, data=values.astype(np.float32))
        datasets = {name: file.create_dataset(name, shape, **kind) for name in DATASETS}
        for start in tqdm(range(0, config.count, SHARD), desc="Merging", unit="shard", dynamic_ncols=True):
            shard = _read_shard(parts, range(start, min(start + SHARD, config.count)), config)
            if shard is None:
                raise InputError(f"{_shard_path(parts, start)} is damaged; the same command computes it again")
            fields = shard[0]
            redraws += int(shard[1].sum())
            for name, channel in DATASETS.items():
                datasets[name][start : start + len(fields)] = fields[..., channel]
        file.attrs.update(config.attributes() | {"redraws": redraws, "generator": "farms_jax sciml.generate"})


def main(name: str = "sciml.generate") -> None:
    """Run the program; a mistake in the settings is one line on stderr, and exit status 2.

    Args:
        name: What the program is called in its messages.
    """

    def run(flow: Annotated[FlowConfig, tyro.conf.arg(name="")], out: Path = Path("data")) -> Path:
        """Make a data set of compressible flows.

        Args:
            flow: what the trajectories are.
            out: folder for the file, which gets the name that PDEBench would give it.

        Returns:
            The file.
        """
        return generate(out / file_name(flow), flow)

    description = usage((__doc__ or "").partition("\n\nThe published")[0], name)
    with reported(name, "; the same command goes on"):
        print(tyro.cli(run, prog=name, description=description))
