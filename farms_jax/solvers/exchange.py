"""What every device of a mesh does: it cuts tiles from its shards, exchanges them, solves its share, tells the others.

Tiles travel by rounds of as many as memory allows, the same number for each device:

    shards --cut--> parts of tiles --all_to_all--> whole tiles --solve--> eigenvalues --all_gather--> spectra

A device cuts from its shard its part of every tile of the round and sends it to the device that solves the tile, which
puts the parts together. Nothing is added up, so the windows are those of the unsharded weight, bit for bit. Over mesh
axes on which a weight is not sharded nothing is sent: there every device takes tiles of its own.

Not `psum_scatter`: between processes on CPU (Gloo, jaxlib 0.10) it fails where one is 30 seconds behind the others,
whatever the timeouts are set to.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from farms_jax._axes import Axes
from farms_jax._windows import Grid
from farms_jax.solvers import accelerator
from farms_jax.solvers.barrier import solve_together
from farms_jax.solvers.cpu import COARSE
from farms_jax.solvers.tiles import Tiles

Layout = tuple[tuple[str, ...], ...]
"""Mesh axes over which each axis of a weight is sharded: `(("data", "model"), ())` for `P(("data", "model"), None)`."""

T = TypeVar("T")


class Kind(NamedTuple):
    """What layers that are solved together have in common: static, hashable."""

    shape: tuple[int, ...]
    dtype: np.dtype
    mesh: Mesh
    layout: Layout
    grid: Grid


class Way(NamedTuple):
    """How they are solved: `solver` is none of `"auto"`."""

    axes: Axes
    platform: str
    solver: str
    max_batch_bytes: int


class _Along(NamedTuple):
    """Of one axis of the weight: what a shard, a tile, and the part of a tile in a shard measure."""

    shards: int
    shard: int
    tile: int
    part: int
    own: Array  # number of this device's shard


class _Passes(NamedTuple):
    """How often all tiles were solved, the next turn, the spectra, and which layers want another pass."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    turn: Array
    pooled: tuple[Array, ...]
    coarse: Array


class Exchange:
    """The work on layers of one kind; its methods run inside `shard_map`."""

    def __init__(self, kind: Kind, tiles: Tiles, way: Way, layers: int) -> None:
        """Plan the rounds.

        Args:
            kind: of the layers.
            tiles: of each of their matrices.
            way: how they are solved.
            layers: how many there are.
        """
        self.kind, self.tiles, self.way, self.layers = kind, tiles, way, layers
        *self._positions, rows, cols = way.axes.permutation(len(kind.shape))
        self._down, self._across = (cols, rows) if kind.grid.transposed else (rows, cols)
        self._extents = [1] * len(kind.shape)
        self._extents[self._down], self._extents[self._across] = tiles.rows, tiles.cols
        self._per_layer = way.axes.stack_shape(kind.shape)[0] * len(tiles.starts)
        self._total = layers * self._per_layer
        self._senders = tuple(name for names in kind.layout for name in names)
        others = [name for name in kind.mesh.axis_names if name not in self._senders]
        self._everyone = (*others, *self._senders)  # receivers among whom weights are sharded come one after the other
        self._precision = np.dtype(jnp.result_type(complex if np.issubdtype(kind.dtype, np.complexfloating) else float))
        self._real = np.finfo(self._precision).dtype
        self._slots = self._slots_of_a_round()

    def _slots_of_a_round(self) -> int:
        """Tiles that one device solves in a round: as many as memory allows, and no more than there are."""
        devices = self.kind.mesh.size
        bound = self.way.max_batch_bytes
        if self.way.platform == "cpu":
            bound //= len(self.kind.mesh.local_devices)
        sizes = [math.prod(self.kind.mesh.shape[name] for name in names) for names in self.kind.layout]
        parts = math.prod(sizes) * math.prod(
            min(tile, length // count)
            for tile, length, count in zip(self._extents, self.kind.shape, sizes, strict=True)
        )
        tile = math.prod(self._extents)
        smaller = min(self.kind.grid.rows, self.kind.grid.cols)
        entries = self._precision.itemsize * (tile + 2 * smaller**2 * len(self.tiles.inner.starts))
        most = max(1, bound // (self.kind.dtype.itemsize * (2 * parts + tile) + entries))
        rounds = -(-self._total // (devices * most))
        return -(-self._total // (devices * rounds))

    def spectra(self, turn: Array, shards: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """Pooled eigenvalues (D, E) of each layer, ascending, the same on every device.

        Args:
            turn: a zero, int32; nothing is sent before it is known.
            shards: of each layer this device's own.

        Returns:
            A zero that is known only when the last eigenvalues are, and the spectra.
        """
        finite = jnp.stack([jnp.isfinite(shard).all() for shard in shards])
        if self._senders:
            finite = lax.pmin(finite.astype(jnp.int32), self._senders) > 0
        if self.way.platform != "cpu":
            return self._pooled(turn, shards, finite, jnp.zeros((), jnp.int32))
        refined = self.way.solver == "gram" and self._real == np.float32

        # As on one device (see `solvers.cpu`): again in float64 where the upper half holds what float32 cannot tell. It
        # is a loop of one pass or two because that is compiled once, and a loop even of one because XLA runs whatever
        # does
        # not depend on each other at once, but never two loops with collectives in them: a program's other collectives
        # would take the threads that devices need to come to the solver.
        def unfinished(state: _Passes) -> Array:
            return (state.count == 0) | ((state.count == 1) & state.coarse.any())

        def one_pass(state: _Passes) -> _Passes:
            turn, found = self._pooled(state.turn, shards, finite, state.count)
            pooled = tuple(map(jnp.where, state.coarse, found, state.pooled))
            middle = pooled[0].shape[1] // 2
            coarse = jnp.stack([(values[:, middle] < COARSE * values[:, -1]).any() for values in pooled])
            return _Passes(state.count + 1, turn, pooled, coarse & refined)

        positions = self._per_layer // len(self.tiles.starts)
        shape = self.kind.grid.divisions, self.kind.grid.num_eigenvalues(positions)
        nothing = tuple(jnp.zeros(shape, self._real) for _ in shards)
        start = _Passes(jnp.zeros((), jnp.int32), turn, nothing, jnp.ones(self.layers, bool))
        last = lax.while_loop(unfinished, one_pass, lax.optimization_barrier(start))
        return last.turn, last.pooled

    def _pooled(
        self, turn: Array, shards: tuple[Array, ...], finite: Array, passes: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        slots, everyone = self._slots, self.kind.mesh.size
        rounds = -(-self._total // (everyone * slots))

        def one_round(turn: Array, number: Array) -> tuple[Array, Array]:
            mine = turn + (number * everyone + lax.axis_index(self._everyone)) * slots
            tiles = self._assemble(self._send(shards, mine), self._numbers(mine, slots))
            layer = self._locate(self._numbers(mine, slots))[0]
            tiles = jnp.where(finite[layer][:, None, None], tiles.astype(self._precision), 0)
            values, turn = self._solve(tiles, turn, jnp.clip(self._total - mine, 0, slots), passes)
            return turn, lax.all_gather(values, self._everyone, axis=0, tiled=True)

        turn, values = lax.scan(one_round, turn, jnp.arange(rounds, dtype=jnp.int32))
        smaller = values.shape[-1]
        values = values.reshape(-1, len(self.tiles.inner.starts), smaller)[: self._total]
        values = values.reshape(self.layers, self._per_layer // len(self.tiles.starts), -1, smaller)
        values = values[:, :, np.array(self.tiles.order)]
        pooled = (self.kind.grid.pool(of_layer.reshape(-1, smaller)) for of_layer in values)
        return turn, tuple(jnp.sort(of_layer, axis=-1) for of_layer in pooled)

    def _numbers(self, first: Array, count: int) -> Array:
        """Numbers of so many tiles; past the end the last one again."""
        return jnp.minimum(first + jnp.arange(count, dtype=jnp.int32), self._total - 1)

    def _locate(self, number: Array) -> tuple[Array, list[Array]]:
        """Layer of a tile, and where it starts on each axis of the weight."""
        layer, rest = jnp.divmod(number, self._per_layer)
        position, tile = jnp.divmod(rest, len(self.tiles.starts))
        starts = [position] * len(self.kind.shape)
        for axis in reversed(self._positions):
            position, starts[axis] = jnp.divmod(position, self.kind.shape[axis])
        top, left = jnp.asarray(np.array(self.tiles.starts, np.int32).T)
        starts[self._down], starts[self._across] = top[tile], left[tile]
        return layer, starts

    def _along(self, axis: int) -> _Along:
        names, length, tile = self.kind.layout[axis], self.kind.shape[axis], self._extents[axis]
        count = math.prod(self.kind.mesh.shape[name] for name in names)
        own = lax.axis_index(names) if names else jnp.zeros((), jnp.int32)
        return _Along(count, length // count, tile, min(tile, length // count), own)

    def _send(self, shards: tuple[Array, ...], mine: Array) -> Array:
        """Parts of my tiles, from each sender in turn, shape (senders * slots, ...one part)."""
        along = [self._along(axis) for axis in range(len(self.kind.shape))]
        senders = math.prod(axis.shards for axis in along)
        first = mine - (lax.axis_index(self._senders) if self._senders else 0) * self._slots  # of the first receiver

        def part(number: Array) -> Array:
            layer, starts = self._locate(number)
            corner = [
                jnp.clip(start - axis.own * axis.shard, 0, axis.shard - axis.part)
                for start, axis in zip(starts, along, strict=True)
            ]
            sizes = [axis.part for axis in along]
            cut = [functools.partial(lax.dynamic_slice, shard, slice_sizes=sizes) for shard in shards]
            return lax.switch(layer, cut, corner)

        parts = lax.map(part, self._numbers(first, senders * self._slots))
        return lax.all_to_all(parts, self._senders, 0, 0, tiled=True) if self._senders else parts

    def _assemble(self, parts: Array, numbers: Array) -> Array:
        """Put tiles together, shape (slots, R, C)."""
        along = [self._along(axis) for axis in range(len(self.kind.shape))]
        ndim = len(along)
        parts = parts.reshape(*(axis.shards for axis in along), len(numbers), *(axis.part for axis in along))
        order = [ndim, *(place for axis in range(ndim) for place in (axis, ndim + 1 + axis))]
        tiles = parts.transpose(order).reshape(len(numbers), *(axis.shards * axis.part for axis in along))
        _, starts = self._locate(numbers)
        for place, axis in enumerate(along):
            if axis.shards > 1:
                entries = functools.partial(_within, axis)
                taken = functools.partial(jnp.take, axis=place, mode="clip")
                tiles = jax.vmap(taken)(tiles, jax.vmap(entries)(starts[place]))
        tiles = tiles.transpose(0, *(1 + axis for axis in self._positions), 1 + self._down, 1 + self._across)
        return tiles.reshape(len(numbers), self.tiles.rows, self.tiles.cols)

    def _solve(self, tiles: Array, turn: Array, count: Array, passes: Array) -> tuple[Array, Array]:
        """Eigenvalues (slots, windows of a tile, n) of this device's tiles, and the next turn."""
        if self.way.platform == "cpu":
            return solve_together(
                tiles,
                count,
                passes,
                self.tiles.inner,
                parties=len(self.kind.mesh.local_devices),
                solver=self.way.solver,
                max_bytes=self.way.max_batch_bytes,
            )
        if self.tiles.rows > self.tiles.cols:
            tiles = tiles.swapaxes(1, 2)
        values = accelerator.batch_eigenvalues(tiles, svd=self.way.solver == "svd")
        return values[:, None, :], turn


def _within(axis: _Along, start: Array) -> Array:
    """Where the entries of a tile that starts there lie in its parts, laid end to end."""
    entry = start + jnp.arange(axis.tile, dtype=jnp.int32)
    shard = entry // axis.shard
    corner = jnp.clip(start - shard * axis.shard, 0, axis.shard - axis.part)  # as it was cut
    return shard * axis.part + entry - shard * axis.shard - corner


def share_rows(function: Callable[..., T], mesh: Mesh, *rows: Array) -> T:
    """Apply a function of rows with every device taking its share of them; within `shard_map`.

    Args:
        function: of arrays with one row each for every row of the result.
        mesh: of the `shard_map`.
        *rows: arrays of N rows, the same on every device.

    Returns:
        Arrays of N rows, the same on every device.
    """
    count = len(rows[0])
    each = -(-count // mesh.size)
    first = lax.axis_index(mesh.axis_names) * each

    def mine(array: Array) -> Array:
        padded = jnp.pad(array, ((0, each * mesh.size - count), *[(0, 0)] * (array.ndim - 1)), mode="edge")
        return lax.dynamic_slice_in_dim(padded, first, each)

    found = function(*map(mine, rows))
    return jax.tree.map(lambda part: lax.all_gather(part, mesh.axis_names, axis=0, tiled=True)[:count], found)
