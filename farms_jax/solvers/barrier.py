"""Solving on CPU for several devices of one process at once, from within an XLA program.

Each device of a CPU mesh is a thread of this process, and all threads reach the solver. They meet there: the last to
come solves the tiles of all, on all cores, while the others wait, and all leave together. This form cannot stand still:

- A `pure_callback` would (see `dispatch`). `buffer_callback` gives the memory itself.
- Nobody waits long inside XLA. A collective in which one device is 40 seconds late ends the process; here they wait
  before it, in Python, for as long as it takes.
- No two meetings cross. Each gives out a zero that the next exchange of tiles needs, so all devices come to the same
  one.
"""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental.buffer_callback import buffer_callback

from farms_jax._windows import Grid
from farms_jax.solvers import cpu
from farms_jax.solvers.dispatch import SOLVING, read_only

_PATIENCE = 600  # seconds that a device waits for the others to come; a solver at work is not counted


def solve_together(
    tiles: Array, count: Array, passes: Array, inner: Grid, *, parties: int, solver: str, max_bytes: int
) -> tuple[Array, Array]:
    """Eigenvalues of the windows of a device's tiles; within `shard_map`, on CPU.

    Args:
        tiles: shape (B, R, C), real or complex.
        count: how many of them count, int32; the others give zeros.
        passes: how often the same tiles were solved before, int32, the same on all devices.
        inner: where the windows lie in each tile.
        parties: devices of this process.
        solver: `"gram"`, in float64 from the second pass on, `"gram64"` or `"svd"`.
        max_bytes: bound on the windows and Gram matrices alive at once, over all devices of this process.

    Returns:
        Shape (B, windows of a tile, n), each row ascending, real; and a zero, int32, that is known when these are.
    """
    shape = (len(tiles), len(inner.starts), min(inner.rows, inner.cols))
    results = jax.ShapeDtypeStruct(shape, tiles.real.dtype), jax.ShapeDtypeStruct((), np.int32)
    meeting = _Meeting(parties, inner, solver, max_bytes)
    values, zero = buffer_callback(meeting, results, vmap_method="sequential")(tiles, count, passes)
    return values, zero


class _Visit:
    """One device's part in a meeting."""

    def __init__(self, stack: np.ndarray, solver: str) -> None:
        self.stack, self.solver = stack, solver
        self.values: np.ndarray | None = None
        self.error: BaseException | None = None
        self.is_over = False


class _Meeting:
    """A callback for so many threads, which returns to none of them before all have come."""

    def __init__(self, parties: int, inner: Grid, solver: str, max_bytes: int) -> None:
        self._parties, self._inner, self._solver, self._max_bytes = parties, inner, solver, max_bytes
        self._here: list[_Visit] = []
        self._condition = threading.Condition()

    def __call__(self, context: Any, out: Sequence[Any], tiles: Any, count: Any, passes: Any) -> None:
        """Write the eigenvalues of a device's tiles to the memory that XLA has for them."""
        del context
        values, zero = map(np.asarray, out)
        stack = read_only(tiles)[: int(np.asarray(count))]
        again = self._solver == "gram" and int(np.asarray(passes)) > 0
        found = self._met(_Visit(stack, "gram64" if again else self._solver))
        values[: len(stack)] = found.reshape(len(stack), *values.shape[1:])
        values[len(stack) :] = 0
        zero[...] = 0

    def _met(self, visit: _Visit) -> np.ndarray:
        with self._condition:
            self._here.append(visit)
            if len(self._here) == self._parties:
                visits, self._here = self._here, []
                self._solve(visits)
                self._condition.notify_all()
            # A solver at work holds the lock, however long: only the wait for the others is bounded.
            elif not self._condition.wait_for(lambda: visit.is_over, _PATIENCE):
                self._here.remove(visit)
                visit.error = TimeoutError(f"a device did not come within {_PATIENCE} s")
        if visit.values is None:
            # XLA passes on the words alone, not the exception.
            raise RuntimeError(f"analyze: windows could not be solved: {visit.error!r}") from visit.error
        return visit.values

    def _solve(self, visits: list[_Visit]) -> None:
        try:
            for solver in {visit.solver for visit in visits}:  # two where two runs of a program are under way at once
                alike = [visit for visit in visits if visit.solver == solver]
                with SOLVING:
                    found = cpu.solve(
                        [visit.stack for visit in alike],
                        [self._inner] * len(alike),
                        self._max_bytes,
                        gram=solver != "svd",
                        precision=np.float64 if solver == "gram64" else None,
                    )
                for visit, values in zip(alike, found, strict=True):
                    visit.values = values
        except BaseException as error:  # all fail alike: none may be left waiting
            for visit in visits:
                visit.error = error
        for visit in visits:
            visit.is_over = True
