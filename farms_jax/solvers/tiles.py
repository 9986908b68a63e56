"""Tiles: the pieces of a matrix that travel between devices, with one window in each or a few that share a product."""

from typing import NamedTuple

import numpy as np

from farms_jax._windows import Grid
from farms_jax.solvers.gram_matrices import shared_runs


class Tiles(NamedTuple):
    """A grid of windows, sorted into equal tiles: static, hashable.

    Attributes:
        rows: rows of a tile.
        cols: columns of a tile.
        starts: (row, column) where each tile starts.
        inner: where the windows lie within a tile, the same in each.
        order: of each window of the grid, its number among those of all tiles, tile after tile.
    """

    rows: int
    cols: int
    starts: tuple[tuple[int, int], ...]
    inner: Grid
    order: tuple[int, ...]


def make_tiles(grid: Grid, *, most: int) -> Tiles:
    """Sort the windows of a grid into tiles.

    Windows of 2 rows that start in rows 0, 1, 2, 3, at most three to a tile, make tiles of 3 rows that start in rows
    0 and 2, two windows in each.

    Args:
        grid: of a dense matrix or a kernel.
        most: windows in a tile; fewer where a product of more would not be worth its size.

    Returns:
        The tiles. Where the windows do not come out even, the last tile overlaps the one before, and the windows of
        both are solved twice.
    """
    runs = shared_runs(grid) if most > 1 else []
    length = min(most, max((len(run.windows) for run in runs), default=1))
    starts = np.array(grid.starts)
    axis = int(bool(runs) and runs[0].by_columns)  # along which the windows of a tile differ
    differ = np.unique(starts[:, axis])
    if length == 1 or len(set(np.diff(differ).tolist())) != 1:
        return Tiles(grid.rows, grid.cols, grid.starts, Grid(grid.rows, grid.cols, ((0, 0),)), _whole(len(starts)))
    parts = -(-len(differ) // length)
    length = -(-len(differ) // parts)
    firsts = np.minimum(np.arange(parts) * length, len(differ) - length)
    offsets = differ[:length] - differ[0]
    common = np.unique(starts[:, 1 - axis])
    place = np.searchsorted(differ, starts[:, axis])
    part = place // length
    order = (np.searchsorted(common, starts[:, 1 - axis]) * parts + part) * length + place - firsts[part]
    span = [grid.rows, grid.cols]
    span[axis] += int(offsets[-1])

    def turned(pairs: np.ndarray) -> tuple[tuple[int, int], ...]:
        return tuple((int(a), int(b)) for a, b in (pairs if axis else pairs[:, ::-1]))

    tile_starts = np.stack([np.repeat(common, parts), np.tile(differ[firsts], len(common))], axis=1)
    inner = Grid(grid.rows, grid.cols, turned(np.stack([np.zeros_like(offsets), offsets], axis=1)))
    return Tiles(span[0], span[1], turned(tile_starts), inner, tuple(order.tolist()))


def _whole(count: int) -> tuple[int, ...]:
    return tuple(range(count))
