"""Eigenvalues on the devices of a mesh: one layer at a time is brought whole to all of them, each solves its share.

No device ever holds more than one layer whole. The devices exchange the eigenvalues of a layer, so that all of them
have the result of one device.

On CPU the devices of a process share its cores, and the solver takes all of them at once (`solvers.cpu`). There the
first device that comes solves for all of its process, and the others wait for its result in Python: not in a
collective, where XLA ends the process after 40 seconds. Nobody waits for a device that might not come, so nothing can
stand still. Several processes solve a share each. Outside of `jit`, in one process, the devices hold a layer each, and
the host solves for all of them at once.
"""

import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from farms_jax._axes import as_matrices, layer_of
from farms_jax._scaling import in_range, in_range_traced
from farms_jax._windows import Grid
from farms_jax.solvers import accelerator, cpu
from farms_jax.solvers.dispatch import Cut, Options, Spectra, in_working_precision, read_only

_PENDING: dict[Any, tuple[Future[np.ndarray], int]] = {}  # results, and the number of devices that still need them
_PENDING_LOCK = threading.Lock()


def common_mesh(weights: Sequence[Any], mesh: Mesh | None) -> Mesh | None:
    """Return the given mesh, or that of sharded weights; `None` where no weight lies on several devices either.

    Raises:
        ValueError: two weights lie on different devices, or one on others than the mesh's.
    """
    other = "another weight" if mesh is None else "`mesh`"
    for weight in weights:
        sharding = None if isinstance(weight, Tracer) else getattr(weight, "sharding", None)
        own = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if not isinstance(own, Mesh) or own.size == 1:
            continue
        mesh = mesh or own
        if set(own.devices.flat) != set(mesh.devices.flat):
            raise ValueError(
                f"analyze: a weight lies on {_devices(own)}, {other} on {_devices(mesh)}; "
                "bring all weights to the same devices, with jax.device_put"
            )
    return mesh


def _devices(mesh: Mesh) -> str:
    return f"{mesh.size} devices ({', '.join(str(device) for device in mesh.devices.flat[:4])}, ...)"


def pooled_eigenvalues(weights: Sequence[Any], cuts: Sequence[Cut], mesh: Mesh, options: Options) -> list[Spectra]:
    """Return what `dispatch.pooled_eigenvalues` does, replicated on the mesh.

    Weights may be traced or not, sharded or not. The bound on bytes holds for each accelerator, or on CPU each process.
    """
    if any(isinstance(weight, Tracer) for weight in weights):
        return _solve_traced(weights, cuts, mesh, options)
    layers = _layers(weights, cuts)
    if options.platform == "cpu" and jax.process_count() == 1:
        spectra = _solve_on_one_host(layers, mesh, options)
    else:
        # One at a time: with over 32 programs under way XLA's threads on CPU wait to start another one, and none is
        # left to run them.
        spectra = [
            jax.block_until_ready(_solve(_on_all_devices(weight, mesh), cut, mesh, options)) for weight, cut in layers
        ]
    counts = [cut.axes.matrices_shape(weight.shape)[0] for weight, cut in zip(weights, cuts, strict=True)]
    ends = np.cumsum([0, *counts])
    return [Spectra(*map(jnp.stack, zip(*spectra[a:b], strict=True))) for a, b in itertools.pairwise(ends)]


def _layers(weights: Sequence[Any], cuts: Sequence[Cut]) -> Iterator[tuple[Any, Cut]]:
    """Yield every layer as an array of its own, so that no more than one is whole."""
    for weight, cut in zip(weights, cuts, strict=True):
        own = Cut(cut.axes.of_layer(weight.ndim), cut.grid)
        for index in cut.axes.indices(weight.shape):
            if index and isinstance(weight, jax.Array):
                yield _layer_at(weight, np.array(index), stack=cut.axes.stack), own
            else:
                yield layer_of(weight, cut.axes, index), own


def _solve_traced(weights: Sequence[Any], cuts: Sequence[Cut], mesh: Mesh, options: Options) -> list[Spectra]:
    """Return the spectra of traced leaves; the program is as long for a stack as for one layer."""
    spectra: list[Spectra] = []
    for weight, cut in zip(weights, cuts, strict=True):
        own = Cut(cut.axes.of_layer(weight.ndim), cut.grid)

        def solve(layer: Any, own: Cut = own) -> Spectra:
            return _solve(jax.device_put(layer, _replicated(mesh)), own, mesh, options)

        if cut.axes.stack:
            indices = jnp.array(cut.axes.indices(weight.shape))
            if spectra:  # in this order, for the reason that `_after` has
                indices = jnp.where(spectra[-1].values[0, 0, 0] < 0, 0, indices)
            pick = functools.partial(_layer_at, weight, stack=cut.axes.stack)
            spectra.append(lax.map(lambda index, pick=pick, solve=solve: solve(pick(index)), indices))
        else:
            single = solve(_after(weight, spectra[-1], mesh) if spectra else weight)
            spectra.append(Spectra(*(part[None] for part in single)))
    return spectra


@functools.partial(jax.jit, static_argnames="stack")
def _layer_at(weight: Array, index: Array, stack: tuple[int, ...]) -> Array:
    """Return the layer at an index (n,) of a stack with n axes, whichever axes of the weight are sharded.

    A gather: of an axis that is sharded XLA takes the one layer from the device that has it. For a slice it would bring
    the whole stack to all devices first.
    """
    sizes = [1 if axis in stack else size for axis, size in enumerate(weight.shape)]
    kept = tuple(range(weight.ndim - len(stack)))
    numbers = lax.GatherDimensionNumbers(kept, collapsed_slice_dims=tuple(sorted(stack)), start_index_map=stack)

    def pick(weight: Array, index: Array) -> Array:
        return lax.gather(weight, index, numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    sharding = jax.typeof(weight).sharding
    if not any(sharding.spec):
        return pick(weight, index)
    # Explicit axes have no rule for a gather from one that is sharded.
    automatic: Any = jax.sharding.auto_axes(pick, out_sharding=NamedSharding(sharding.mesh, PartitionSpec()))
    return automatic(weight, index)


def _solve_on_one_host(layers: Iterator[tuple[Any, Cut]], mesh: Mesh, options: Options) -> list[Spectra]:
    """Return the spectra of layers, where the host solves for all devices: each holds another layer.

    Several layers keep all cores busy, even where a layer has a single window.
    """
    spectra: list[Spectra] = []
    while group := list(itertools.islice(layers, mesh.size)):
        placed = [jax.device_put(layer, device) for (layer, _), device in zip(group, mesh.devices.flat, strict=False)]
        cuts = [cut for _, cut in group]
        whole = [np.asarray(in_working_precision(each)) for each in placed]
        stacks, exponents = zip(*(in_range(_matrices(*pair)) for pair in zip(whole, cuts, strict=True)), strict=True)
        grids = [cut.grid for cut in cuts]
        found = cpu.spectra(stacks, grids, solver=options.solver_on("cpu"), max_bytes=options.max_bytes)
        own = list(zip(found, np.array(exponents, np.int32), strict=True))
        spectra += [Spectra(*pair) for pair in jax.device_put(own, _replicated(mesh))]
    return spectra


def _matrices(weight: Any, cut: Cut) -> Any:
    """Return the matrices (K, R, C) of a layer that is no part of a stack."""
    return as_matrices(weight, cut.axes)[0]


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _on_all_devices(weight: Any, mesh: Mesh) -> Array:
    if jax.process_count() > 1 and not (isinstance(weight, jax.Array) and not weight.is_fully_addressable):
        host = np.asarray(weight)  # the same in each process: `device_put` would send it around to compare it
        return jax.make_array_from_callback(host.shape, _replicated(mesh), lambda index: host[index])
    return jax.device_put(weight, _replicated(mesh))


def _after(weight: Any, previous: Spectra, mesh: Mesh) -> Array:
    """Return a traced weight that depends on the previous layer's spectrum: XLA would gather all layers at once.

    XLA does not know that no eigenvalue is negative. `lax.optimization_barrier` would not help: on CPU it is removed
    before XLA decides on the order.
    """
    later = jnp.where(previous.values[0, 0, 0] < 0, jnp.nan, weight)
    automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    # Sharded explicitly: where XLA is free to choose, it gathers the weight first, and holds it whole.
    spec = shard_evenly(weight.shape, {name: mesh.shape[name] for name in automatic})
    return lax.with_sharding_constraint(later, NamedSharding(mesh, spec)) if automatic else later


def shard_evenly(shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Return a layout for a traced weight, whose own is unknown: each mesh axis shards the longest axis it divides.

    >>> tuple(shard_evenly((64, 96), {"x": 4, "y": 2}))
    ('y', 'x')
    """
    names: list[tuple[str, ...]] = [()] * len(shape)
    lengths = list(shape)
    for name, size in sizes.items():
        divisible = [axis for axis, length in enumerate(lengths) if length % size == 0]
        if divisible:
            axis = max(divisible, key=lengths.__getitem__)
            names[axis] = (*names[axis], name)
            lengths[axis] //= size
    return PartitionSpec(*(sharded_by or None for sharded_by in names))


@functools.partial(jax.jit, static_argnames=("cut", "mesh", "options"))
def _solve(weight: Array, cut: Cut, mesh: Mesh, options: Options) -> Spectra:
    """Return the spectrum, values (D, E) and exponent (), of a layer that every device has."""
    weight, exponent = in_range_traced(in_working_precision(weight))
    on_cpu, on_accelerators = (
        functools.partial(solve, cut=cut, mesh=mesh, options=options) for solve in (_on_cpu_devices, _on_accelerators)
    )
    if options.platform is None:
        solve = functools.partial(lax.platform_dependent, cpu=on_cpu, default=on_accelerators)
    else:
        solve = on_cpu if options.platform == "cpu" else on_accelerators
    everywhere = PartitionSpec()
    # JAX does not see that what all devices have gathered is the same, hence no `check_vma`.
    solve = jax.shard_map(solve, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return Spectra(solve(weight), exponent)


def _on_accelerators(weight: Array, cut: Cut, mesh: Mesh, options: Options) -> Array:
    """Return the spectrum of a layer inside `shard_map`: every device solves an equal part of the windows."""
    stack = _matrices(weight, cut)
    number, solver = lax.axis_index(mesh.axis_names), options.solver_on("default")
    values = accelerator.part_of_windows(stack, cut.grid, number, mesh.size, solver=solver, max_bytes=options.max_bytes)
    values = lax.all_gather(values, mesh.axis_names, tiled=True)[: len(stack) * len(cut.grid.starts)]
    return jnp.sort(cut.grid.pool(values), axis=-1)


def _on_cpu_devices(weight: Array, cut: Cut, mesh: Mesh, options: Options) -> Array:
    """Return the spectrum of a layer inside `shard_map`: every process solves a part of the windows."""
    _, positions, _, _ = cut.axes.matrices_shape(weight.shape)
    grid = cut.grid
    shape = jax.ShapeDtypeStruct((positions * len(grid.starts), grid.gram_rows), weight.real.dtype)
    owners = [device.process_index for device in mesh.devices.flat]
    first_devices = [owners.index(process) for process in _processes(mesh)]
    connected = jnp.zeros((), np.int32)
    if len(first_devices) > 1:
        # Processes connect at the first collective of a group of devices, and give up after 30 seconds (Gloo): so they
        # meet here, not after the solver, where one may come much later than another.
        connected = lax.all_gather(connected, mesh.axis_names).sum()

    def spectrum(solver: str) -> Array:
        write = functools.partial(_write_eigenvalues, cut=cut, mesh=mesh, options=options._replace(solver=solver))
        (values,) = buffer_callback(write, [shape], vmap_method="sequential")(weight, connected)
        if len(first_devices) > 1:
            # Each process has zeros in place of what the others solve, so that the sum is exact.
            values = lax.all_gather(values, mesh.axis_names)[np.array(first_devices)].sum(0)
        return jnp.sort(grid.pool(values), axis=-1)

    solver = options.solver_on("cpu")
    found = spectrum(solver)
    if solver == "gram" and found.dtype != np.float64:
        # As in `cpu.window_spectra`; by the whole spectrum, so that all processes decide alike.
        is_coarse = (found[:, found.shape[1] // 2] < cpu.COARSE * found[:, -1]).any()
        found = lax.cond(is_coarse, lambda: spectrum("gram64"), lambda: found)
    return found


def _processes(mesh: Mesh) -> list[int]:
    return sorted({device.process_index for device in mesh.devices.flat})


def _write_eigenvalues(
    context: Any, out: Sequence[Any], weight: Any, connected: Any, *, cut: Cut, mesh: Mesh, options: Options
) -> None:
    """Write the eigenvalues (K * W, n) of this process's windows, and zeros for the others, to XLA's memory."""
    del context, connected
    weight, grid = read_only(weight), cut.grid
    stack = _matrices(weight, cut)
    processes = _processes(mesh)
    positions, windows = _windows_of_process(grid, len(stack), processes.index(jax.process_index()), len(processes))

    def solve() -> np.ndarray:
        own = grid._replace(starts=tuple(grid.starts[window] for window in windows))
        return cpu.solve([stack[positions]], [own], solver=options.solver, max_bytes=options.max_bytes)[0]

    digest = hashlib.sha256(weight.view(np.uint8)).digest()
    found = _solved_once((digest, cut, options), len(mesh.local_devices), solve)
    values = np.asarray(out[0])
    values[...] = 0
    by_position = values.reshape(len(stack), len(grid.starts), -1)
    by_position[positions, windows] = found.reshape(-1, len(windows), values.shape[1])


def _windows_of_process(grid: Grid, positions: int, number: int, count: int) -> tuple[slice, np.ndarray]:
    """Return the kernel positions, and the numbers of the grid's starts, that process `number` of `count` solves.

    The windows of a dense matrix are split by the rows or by the columns that they start in, so that each part is a
    grid of its own, whose neighbouring windows still share their Gram matrices.
    """
    every = np.arange(len(grid.starts))
    if positions > 1:
        return slice(number * positions // count, (number + 1) * positions // count), every
    rows, cols = np.array(grid.starts).T
    starts = max(rows, cols, key=lambda axis: len(np.unique(axis)))
    own = np.flatnonzero(np.isin(starts, np.array_split(np.unique(starts), count)[number]))
    return (slice(0, 1), own) if len(own) else (slice(0, 0), every)


def _solved_once(key: Any, devices: int, solve: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the result of `solve`, which only the first of `devices` threads with this key calls.

    The key holds a digest of the weight: nothing else tells apart the runs of a program that are under way at once.

    Raises:
        RuntimeError: `solve` failed, in whichever thread.
    """
    with _PENDING_LOCK:
        is_first = key not in _PENDING
        result, missing = _PENDING.pop(key, (Future(), devices))
        if missing > 1:
            _PENDING[key] = result, missing - 1
    if is_first:
        try:
            result.set_result(solve())
        except BaseException as error:
            result.set_exception(error)
    try:
        return result.result()
    except BaseException as error:
        # XLA passes on the message alone, not the exception.
        raise RuntimeError(f"analyze: windows could not be solved: {error!r}") from error
