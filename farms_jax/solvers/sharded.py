"""Weights spread over the devices of a mesh: every device solves its share of the windows, and no matrix is gathered.

Here it is decided which layers are solved together and where they lie; `_exchange` has what every device then does.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from farms_jax._axes import Axes
from farms_jax._windows import Grid
from farms_jax.solvers import dispatch
from farms_jax.solvers.exchange import Exchange, Kind, Layout, Way
from farms_jax.solvers.tiles import Tiles, make_tiles

_IDLE = 1 / 8  # of the devices' time at most, for which fewer layers are solved together

T = TypeVar("T")


def common_mesh(weights: Sequence[Any], mesh: Mesh | None) -> Mesh | None:
    """Find the mesh of an analysis: the given one, or that which sharded weights bring along.

    Args:
        weights: arrays, traced or not, of numpy or of jax.
        mesh: as given by the user.

    Returns:
        The mesh; `None` where none is given and no weight lies on several devices.

    Raises:
        ValueError: two weights lie on different devices, or one on others than the mesh's.
    """
    other = "another weight" if mesh is None else "`mesh`"
    for own in filter(None, map(_own_mesh, weights)):
        mesh = mesh or own
        if set(own.devices.flat) != set(mesh.devices.flat):
            raise ValueError(
                f"analyze: a weight lies on {_devices(own)}, {other} on {_devices(mesh)}; "
                "bring all weights to the same devices, with jax.device_put"
            )
    return mesh


def _devices(mesh: Mesh) -> str:
    return f"{mesh.size} devices ({', '.join(str(device) for device in mesh.devices.flat[:4])}, ...)"


def _own_mesh(weight: Any) -> Mesh | None:
    """The mesh of several devices on which a concrete array lies, or `None`."""
    if isinstance(weight, Tracer) or not isinstance(weight, jax.Array):
        return None
    sharding = weight.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh if sharding.mesh.size > 1 else None


def pooled_eigenvalues(
    weights: Sequence[Any],
    axes: Axes,
    grids: Sequence[Grid],
    *,
    mesh: Mesh,
    platform: str,
    solver: dispatch.Solver,
    exact: bool,
    max_batch_bytes: int,
) -> list[Array]:
    """Eigenvalues of all windows of each layer, as `dispatch.pooled_eigenvalues`; on every device of the mesh.

    Layers of one shape, layout and grid are solved together, as many as keep all devices busy. Eagerly, each shape is
    compiled once.

    Args:
        weights: L weights, traced or not, of numpy or of jax, sharded or not.
        axes: rows and columns of the weights.
        grids: L grids.
        mesh: of `common_mesh`.
        platform: of the mesh's devices.
        solver: see `analyze`.
        exact: see `dispatch.pooled_eigenvalues`.
        max_batch_bytes: see `analyze`; of each device, on CPU of all devices of a process together.

    Returns:
        L arrays (D, E), ascending, real, not negative, replicated.

    Raises:
        ValueError: `"gram64"` on an accelerator without `jax_enable_x64`.
    """
    way = Way(axes, platform, dispatch.chosen_solver(solver, platform=platform, exact=exact), max_batch_bytes)
    kinds: dict[Kind, list[int]] = {}
    for layer, (weight, grid) in enumerate(zip(weights, grids, strict=True)):
        kinds.setdefault(_kind(weight, grid, mesh), []).append(layer)
    # On CPU windows that overlap share products, as far as there are windows for all devices.
    share = platform == "cpu" and way.solver != "svd"
    traced = any(isinstance(weight, Tracer) for weight in weights)
    turn = _zero(mesh, traced=traced)
    spectra: dict[int, Array] = {}
    for kind, layers in kinds.items():
        positions = axes.stack_shape(kind.shape)[0]
        windows = len(layers) * positions * len(kind.grid.starts)
        tiles = make_tiles(kind.grid, most=max(1, windows // mesh.size) if share else 1)
        for group in _groups(layers, positions * len(tiles.starts), mesh.size):
            placed = tuple(_place(weights[layer], kind) for layer in group)
            turn, found = _solve(_on(kind.mesh, turn), placed, kind=kind, tiles=tiles, way=way)
            turn, found = _on(mesh, (turn, found))
            if platform == "cpu" and not traced:
                # With over 32 programs under way XLA's threads wait to start another, and none is left to run them.
                jax.block_until_ready(turn)
            spectra.update(zip(group, found, strict=True))
    return [spectra[layer] for layer in range(len(weights))]


def _groups(layers: list[int], tiles: int, devices: int) -> list[list[int]]:
    """Split layers of so many tiles each into groups, the smallest that leave few devices idle in the last round."""
    idle = {size: -(size * tiles) % devices / (size * tiles) for size in range(1, len(layers) + 1)}
    size = next(size for size, share in idle.items() if share <= max(_IDLE, min(idle.values())))
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def _kind(weight: Any, grid: Grid, mesh: Mesh) -> Kind:
    own = _own_mesh(weight)
    if own is not None:
        return Kind(weight.shape, np.dtype(weight.dtype), own, _layout(weight.sharding.spec, weight.ndim), grid)
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(weight.dtype))
    known, free = ((),) * weight.ndim, mesh.axis_names
    if isinstance(weight, Tracer):  # its layout is known along explicit axes, and ours to choose along the others
        known = _layout(jax.typeof(weight).sharding.spec, weight.ndim)
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        free = tuple(name for name, kind in types if kind != AxisType.Explicit)
    return Kind(weight.shape, dtype, mesh, choose_layout(weight.shape, known, free, mesh), grid)


def _layout(spec: PartitionSpec, ndim: int) -> Layout:
    names = [(name,) if isinstance(name, str) else tuple(name or ()) for name in spec]
    return tuple(names) + ((),) * (ndim - len(names))


@functools.cache
def choose_layout(shape: tuple[int, ...], known: Layout, free: tuple[str, ...], mesh: Mesh) -> Layout:
    """Choose a layout for a weight whose own is not known while tracing, or that is not sharded.

    It has as many shards as can be, on as few axes as can be, the longest: on `{"x": 4, "y": 2}` a weight (64, 96) gets
    `P(None, ("x", "y"))`. Mesh axes that divide no axis of the weight are left out of it: over those no weight of this
    shape can be sharded.

    Args:
        shape: of the weight.
        known: layout to keep.
        free: mesh axes to add to it.
        mesh: the mesh.

    Returns:
        The layout.
    """

    def layout(places: tuple[int, ...]) -> Layout:
        """The known layout with each free mesh axis added to an axis of the weight, or to none where it is -1."""
        wider = list(known)
        for name, place in zip(free, places, strict=True):
            if place >= 0:
                wider[place] = (*wider[place], name)
        return tuple(wider)

    def shards(layout: Layout) -> list[int]:
        return [math.prod(mesh.shape[name] for name in names) for names in layout]

    def rank(layout: Layout) -> tuple[int, int, int]:
        counts = shards(layout)
        sharded = [length for length, count in zip(shape, counts, strict=True) if count > 1]
        return math.prod(counts), -len(sharded), sum(sharded)

    every = map(layout, itertools.product(range(-1, len(shape)), repeat=len(free)))
    return max((one for one in every if not any(map(int.__mod__, shape, shards(one)))), key=rank)


def _place(weight: Any, kind: Kind) -> Any:
    """Bring a weight to its layout, to each device its shard alone; `shard_map` brings a traced one there."""
    if isinstance(weight, Tracer) or _own_mesh(weight) is not None:
        return weight
    sharding = NamedSharding(kind.mesh, _spec(kind.layout))
    if isinstance(weight, jax.Array) and (jax.process_count() == 1 or not weight.is_fully_addressable):
        return jax.device_put(weight, sharding)
    host = np.asarray(weight)  # in several processes, the same in each
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index].astype(kind.dtype, copy=False))


def _spec(layout: Layout) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in layout))


def _zero(mesh: Mesh, *, traced: bool) -> Array:
    zero = np.zeros((), np.int32)
    if traced:
        return jnp.asarray(zero)
    return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda index: zero[index])


def _on(mesh: Mesh, arrays: T) -> T:
    """Bring replicated arrays to this mesh: weights may lie on several meshes of the same devices."""
    if any(isinstance(leaf, Tracer) or leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(arrays)):
        return arrays
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("kind", "tiles", "way"))
def _solve(turn: Array, weights: tuple[Array, ...], *, kind: Kind, tiles: Tiles, way: Way) -> tuple[Array, Any]:
    """Spectra (D, E) of weights of one kind, and a zero that the next such call takes as its turn."""
    return jax.shard_map(
        Exchange(kind, tiles, way, len(weights)).spectra,
        mesh=kind.mesh,
        in_specs=(PartitionSpec(), _spec(kind.layout)),
        out_specs=PartitionSpec(),
        check_vma=False,  # it does not see that what all have gathered is the same
    )(turn, weights)
