"""Trajectories of random flows, computed in shards, so that a kill while a data set is made costs little work."""

import collections
import contextlib
import itertools
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic

from .flow import DENSITY, Gas, simulate
from .flow_config import FlowConfig
from .hdf5 import CHANNELS
from .initial import random_state

SHARD = 16  # trajectories that a kill can cost, and that an accelerator computes side by side
_TRIES = 10  # redraws of one trajectory, or of one in ten, after which the settings are at fault
_UNSTABLE = "density or pressure does not stay positive: {}; lower --mach, or raise --eta and --zeta, or --size"

Solver = Callable[[np.ndarray, np.ndarray], Array]
T = TypeVar("T")


def ranges(config: FlowConfig) -> list[range]:
    """Return the indices of the trajectories in each shard."""
    return [range(start, min(start + SHARD, config.count)) for start in range(0, config.count, SHARD)]


def shard_path(parts: Path, start: int) -> Path:
    """Return the file of the shard whose first trajectory has this index."""
    return parts / f"{start:07d}.npz"


def make_shards(parts: Path, config: FlowConfig) -> None:
    """Compute the shards that are missing: START.npz with `fields` (n, T, X, Y, 4) float32 and `redraws` (n,)."""
    found = [shard for shard in ranges(config) if shard_path(parts, shard.start).exists()]
    whole = []
    for shard in tqdm(found, desc="Checking", unit="shard", leave=False, disable=not found):
        if read_shard(parts, shard, config) is not None:
            whole.append(shard)
        else:
            tqdm.write(f"{shard_path(parts, shard.start)} is damaged and computed again", file=sys.stderr)
    missing = [shard for shard in ranges(config) if shard not in whole]
    indices = [index for shard in missing for index in shard]
    if not indices:
        return
    bar = tqdm(total=config.count, initial=config.count - len(indices), desc="Flows", unit="flow", dynamic_ncols=True)
    total = 0
    # Closed: after an error or a stop, flows that no thread has begun are not computed.
    with bar, contextlib.closing(_compute(config, indices)) as results:
        for shard in missing:
            fields, redraws = [], []
            for trajectory, attempts in itertools.islice(results, len(shard)):
                fields.append(trajectory)
                redraws.append(attempts)
                bar.update()
            total += sum(redraws)
            if total > max(_TRIES, config.count // 10):
                raise InputError(_UNSTABLE.format(f"{total} of {bar.n + total} flows failed"))
            with atomic(shard_path(parts, shard.start)) as part, part.open("wb") as file:
                np.savez(file, fields=np.stack(fields), redraws=redraws)


def read_shard(parts: Path, shard: range, config: FlowConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """Read fields and redraws; return `None` if they are damaged, by the CRC-32s of the archive."""
    shape = (len(shard), config.steps, config.size, config.size, len(CHANNELS))
    path = shard_path(parts, shard.start)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # NumPy alone would not see damage to an array's shape
                return None
        with np.load(path, allow_pickle=False) as file:
            fields, redraws = file["fields"], file["redraws"]
    # All that a damaged zip archive raises: RuntimeError where one of its flags says that it is encrypted.
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return (fields, redraws) if fields.shape == shape and redraws.shape == shape[:1] else None


def _compute(config: FlowConfig, indices: list[int]) -> Generator[tuple[np.ndarray, int]]:
    """Yield fields (T, X, Y, 4), float32, and number of redraws of each trajectory, in the order of `indices`.

    A trajectory depends on the seed and its index alone. An InputError says that one was redrawn too often.
    """
    # A CPU computes one per core, each in a thread of its own: `jax.vmap`, where all wait for the one with the shortest
    # steps, takes three times as long, and so the numbers cannot depend on the neighbours. An accelerator needs many at
    # a time to be busy.
    on_cpu = jax.default_backend() == "cpu"
    lanes = 1 if on_cpu else SHARD
    threads = (os.cpu_count() or 1) if on_cpu else 1
    solve = _solver(config, lanes)
    # The last batch is filled up with its last index: one shape, one compilation.
    batches = [indices[start : start + lanes] for start in range(0, len(indices), lanes)]
    full = [np.array(batch + batch[-1:] * (lanes - len(batch)), np.uint32) for batch in batches]
    pool = ThreadPoolExecutor(threads)
    try:
        futures = collections.deque(pool.submit(_draw, solve, batch) for batch in full)
        for batch in batches:
            fields, redraws = _finished(futures.popleft())
            for lane in range(len(batch)):
                yield fields[lane], int(redraws[lane])
    finally:  # whoever stops this does not wait for flows that are being computed, which can take minutes
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(future: Future[T]) -> T:
    """Return a result. Python hears a signal that comes just before a wait only at its end: no wait is long."""
    while not future.done():
        wait([future], timeout=1)
    return future.result()


def _solver(config: FlowConfig, lanes: int) -> Solver:
    """Compile the function from indices and attempts, uint32 of shape (lanes,), to fields (lanes, T, X, Y, 4)."""
    times = jnp.linspace(0, config.end, config.steps)

    def solve(index: Array, attempt: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), index), attempt)
        initial = random_state(key, config.size, config.mach, config.initial)
        return simulate(initial, Gas(config.eta, config.zeta), times)

    def single(index: Array, attempt: Array) -> Array:
        return solve(index[0], attempt[0])[None]

    number = jax.ShapeDtypeStruct((lanes,), jnp.uint32)
    return jax.jit(single if lanes == 1 else jax.vmap(solve)).lower(number, number).compile()


def _draw(solve: Solver, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute trajectories (lanes, T, X, Y, 4); one that does not stay positive is drawn again, 10 times at most."""
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
    """Return which of N trajectories (N, T, X, Y, 4) are finite, of positive density and pressure throughout, (N,)."""
    axes = (1, 2, 3, 4)
    return np.all(np.isfinite(fields), axes) & np.all(fields[..., DENSITY:] > 0, axes)
