"""Shards: finished trajectories of an unfinished data set, so that a kill costs little work."""

import contextlib
import itertools
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic

from .flow_config import FlowConfig
from .hdf5 import CHANNELS
from .trajectories import TRIES, UNSTABLE, compute_trajectories

SHARD = 16  # trajectories that a kill can cost, and that an accelerator computes side by side


def ranges(config: FlowConfig) -> list[range]:
    """Return the indices of the trajectories in each shard."""
    return [range(start, min(start + SHARD, config.count)) for start in range(0, config.count, SHARD)]


def make_shards(parts: Path, config: FlowConfig) -> None:
    """Compute the shards that are missing: START.npz with `fields` (n, T, X, Y, 4) float32 and `redraws` (n,)."""
    whole = _whole_shards(parts, config)
    missing = [shard for shard in ranges(config) if shard not in whole]
    indices = [index for shard in missing for index in shard]
    if not indices:
        return
    bar = tqdm(total=config.count, initial=config.count - len(indices), desc="Flows", unit="flow", dynamic_ncols=True)
    total = 0
    # Closed: after an error or a stop, flows that no thread has begun are not computed.
    with bar, contextlib.closing(compute_trajectories(config, indices, SHARD)) as results:
        for shard in missing:
            fields, redraws = [], []
            for trajectory, attempts in itertools.islice(results, len(shard)):
                fields.append(trajectory)
                redraws.append(attempts)
                bar.update()
            total += sum(redraws)
            if total > max(TRIES, config.count // 10):
                raise InputError(UNSTABLE.format(f"{total} of {bar.n + total} flows failed"))
            with atomic(shard_path(parts, shard.start)) as part, part.open("wb") as file:
                np.savez(file, fields=np.stack(fields), redraws=redraws)


def shard_path(parts: Path, start: int) -> Path:
    """Return the file of the shard whose first trajectory has this index."""
    return parts / f"{start:07d}.npz"


def _whole_shards(parts: Path, config: FlowConfig) -> list[range]:
    """Return the shards that an earlier process computed, but for damaged ones."""
    there = [shard for shard in ranges(config) if shard_path(parts, shard.start).exists()]
    whole = []
    for shard in tqdm(there, desc="Checking", unit="shard", leave=False, disable=not there):
        if read_shard(parts, shard, config) is not None:
            whole.append(shard)
        else:
            tqdm.write(f"{shard_path(parts, shard.start)} is damaged and computed again", file=sys.stderr)
    return whole


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
