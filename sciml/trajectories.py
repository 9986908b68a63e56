"""Trajectories of random flows, computed one per core of a CPU or side by side on an accelerator."""

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from farms_jax.errors import InputError

from .flow import DENSITY, Gas, simulate
from .flow_config import FlowConfig
from .initial import random_state

TRIES = 10  # redraws of one trajectory, or of one in ten, after which the settings are at fault
UNSTABLE = "density or pressure does not stay positive: {}; lower --mach, or raise --eta and --zeta, or --size"

Solver = Callable[[np.ndarray, np.ndarray], Array]


def compute_trajectories(config: FlowConfig, indices: list[int], lanes: int) -> Generator[tuple[np.ndarray, int]]:
    """Yield fields (T, X, Y, 4), float32, and number of redraws of each trajectory, in the order of `indices`.

    A trajectory depends on the seed and its index alone. An accelerator computes `lanes` side by side, as it needs
    many at a time to be busy. An InputError says that a trajectory was redrawn too often.

    Yields:
        Fields and redraws.
    """
    # A CPU computes one per core, each in a thread of its own: `jax.vmap`, where all wait for the one with the shortest
    # steps, takes three times as long, and so the numbers cannot depend on the neighbours.
    on_cpu = jax.default_backend() == "cpu"
    lanes = 1 if on_cpu else lanes
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


def _solver(config: FlowConfig, lanes: int) -> Solver:
    """Compile the function from indices and attempts, uint32 of shape (lanes,), to fields (lanes, T, X, Y, 4)."""
    times = jnp.linspace(0, config.end, config.steps)

    def solve(index: Array, attempt: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), index), attempt)
        return simulate(
            random_state(key, config.size, config.mach, config.initial), Gas(config.eta, config.zeta), times
        )

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
        if attempts.max() > TRIES:
            raise InputError(UNSTABLE.format(f"flow {indices[attempts.argmax()]} failed {attempts.max()} times"))
        again = np.asarray(solve(indices, attempts), np.float32)
        fields = np.where(failed[:, None, None, None, None], again, fields)
    return fields, attempts


def _stays_positive(fields: np.ndarray) -> np.ndarray:
    """Return which of N trajectories (N, T, X, Y, 4) are finite, of positive density and pressure throughout, (N,)."""
    axes = (1, 2, 3, 4)
    return np.all(np.isfinite(fields), axes) & np.all(fields[..., DENSITY:] > 0, axes)
