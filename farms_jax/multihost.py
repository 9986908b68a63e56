"""Analysis spread over the processes of `jax.distributed`, layer by layer.

    jax.distributed.initialize()                      # in every process, at the start
    report = farms_jax.multihost.analyze(params)      # in every process, and the same report in each

For weights that every process has or can read. Weights that lie sharded over the devices of several processes are what
`farms_jax.analyze(params, mesh=mesh)` is for.
"""

import functools
import heapq
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from farms_jax import _analyze
from farms_jax._axes import FLAX_AXES, Axes
from farms_jax._names import named_leaves, natural_key
from farms_jax._report import METRICS, LayerReport
from farms_jax._tail import Tail
from farms_jax._windows import Grid, Window
from farms_jax.errors import InputError

_MESSAGE = 4096  # bytes of an error that the other processes hear of
_TOLD = {"InputError": InputError, "ValueError": ValueError}  # raised in them as what it is

T = TypeVar("T")


class _Task(NamedTuple):
    """The layers of the whole network, and how they are measured: the same in all processes."""

    layers: list[tuple[str, Any]]
    grids: list[Grid]
    left_out: list[tuple[str, str]]
    window: Window | None
    tail: Tail
    axes: Axes
    settings: Mapping[str, Any]


def analyze(
    params: Any,
    *,
    window: Window | None = Window(),  # noqa: B008 (frozen)
    tail: Tail = Tail(),  # noqa: B008
    axes: Axes = FLAX_AXES,
    exclude: str | Iterable[str] = (),
    **settings: Any,
) -> LayerReport:
    """Analyse a network with every process taking its share of the layers.

    All processes must call it with the same arguments. Each reads only its own layers, so that leaves may be anything
    with `shape`, `dtype` and `__array__`, such as data sets of h5py. What is exchanged is small: measures, errors, and
    eigenvalues where they are asked for. An error in one process is raised in all.

    >>> import farms_jax, numpy as np
    >>> report = farms_jax.multihost.analyze({"dense": np.random.default_rng(0).normal(size=(64, 32))})
    >>> report.names
    ('dense',)

    Args:
        params: see `farms_jax.analyze`; of arrays in this process's own memory or on its own devices.
        window: see `farms_jax.analyze`.
        tail: see `farms_jax.analyze`.
        axes: see `farms_jax.analyze`.
        exclude: see `farms_jax.analyze`.
        **settings: the others of `farms_jax.analyze`; a `mesh` is one of this process's own devices.

    Returns:
        In every process the report that one process alone would make.

    Raises:
        InputError: a weight has NaN or Inf; all such layers are named.
        ValueError: see `farms_jax.analyze`; or the processes were given different models or settings, or a weight lies
            on devices of several processes.
        RuntimeError: another process failed in another way.
    """
    choose = functools.partial(_chosen, params, window, tail, axes, exclude, settings)
    sums, task = _together(choose, {"sum": np.zeros((), np.uint32)})
    if len(set(sums["sum"].tolist())) > 1:
        raise ValueError("multihost.analyze: the processes were given different models or settings; give all the same")
    owners = assign([_cost(leaf, grid, axes) for (_, leaf), grid in zip(task.layers, task.grids, strict=True)])
    mine = np.flatnonzero(owners == jax.process_index())
    found, weights = _together(functools.partial(_read, task, mine), {"bad": np.zeros(len(owners), bool)})
    _analyze.raise_if_not_finite([task.layers[layer][0] for layer in np.flatnonzero(found["bad"].any(0))])
    nothing = _nothing(task, owners)
    measures, _ = _together(functools.partial(_measured, task, mine, weights, nothing), nothing)
    return _whole(task, owners, measures)


def assign(costs: Sequence[float]) -> np.ndarray:
    """Spread layers over the processes: the costliest first, each to the process with the least to do.

    Args:
        costs: of the layers, in any unit.

    Returns:
        The process of each layer, int; the same in every process.
    """
    owners = np.zeros(len(costs), int)
    loads = [(0.0, process) for process in range(jax.process_count())]
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        load, owners[layer] = loads[0]
        heapq.heapreplace(loads, (load + costs[layer], int(owners[layer])))
    return owners


def _chosen(
    params: Any,
    window: Window | None,
    tail: Tail,
    axes: Axes,
    exclude: str | Iterable[str],
    settings: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], _Task]:
    leaves = sorted(named_leaves(params), key=lambda pair: natural_key(pair[0]))
    for name, leaf in leaves:
        if isinstance(leaf, Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            where = "is traced" if isinstance(leaf, Tracer) else "lies on devices of several processes"
            raise ValueError(f"multihost.analyze: {name} {where}; call farms_jax.analyze(params, mesh=mesh)")
    layers, grids, left_out = _analyze.select_layers(leaves, window, tail, axes, exclude)
    task = _Task(layers, grids, left_out, window, tail, axes, settings)
    shown = [(name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in layers]
    local = {key: value for key, value in settings.items() if key != "mesh"}
    text = repr((shown, *task[2:-1], sorted(local.items())))
    return {"sum": np.array(zlib.crc32(text.encode()), np.uint32)}, task


def _cost(leaf: Any, grid: Grid, axes: Axes) -> float:
    """Of the eigenvalues of a layer, as `solvers.cpu` has it."""
    words = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
    count = axes.stack_shape(leaf.shape)[0] * len(grid.starts)
    return float(count) * min(grid.rows, grid.cols) ** 2 * max(grid.rows, grid.cols) * words**2


def _read(task: _Task, mine: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    weights = {
        name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        for name, leaf in (task.layers[layer] for layer in mine)
    }
    bad = set(_analyze.not_finite(list(weights.items())))
    return {"bad": np.array([name in bad for name, _ in task.layers], bool)}, weights


def _nothing(task: _Task, owners: np.ndarray) -> dict[str, np.ndarray]:
    """What a process gives that has no results, of the same shapes and dtypes as those of any other."""
    real = jnp.result_type(float)
    empty = {metric: np.zeros(len(owners), np.int32 if metric == "num_eigenvalues" else real) for metric in METRICS}
    if task.settings.get("eigenvalues"):
        longest = max((sum(_sizes(task, np.flatnonzero(owners == owner))) for owner in set(owners.tolist())), default=0)
        empty["eigenvalues"] = np.zeros(longest, real)
    return empty


def _sizes(task: _Task, layers: Iterable[int]) -> list[int]:
    """Eigenvalues of layers, over all divisions."""
    shapes = [(task.grids[layer], task.axes.stack_shape(task.layers[layer][1].shape)[0]) for layer in layers]
    return [grid.divisions * grid.num_eigenvalues(positions) for grid, positions in shapes]


def _measured(
    task: _Task, mine: np.ndarray, weights: dict[str, Any], nothing: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], None]:
    report = _analyze.analyze(weights, window=task.window, tail=task.tail, axes=task.axes, **task.settings)
    results = {key: array.copy() for key, array in nothing.items()}
    for metric in METRICS:
        results[metric][mine] = np.asarray(getattr(report, metric))
    if report.eigenvalues:
        flat = np.concatenate([np.asarray(values).ravel() for values in report.eigenvalues])
        results["eigenvalues"][: len(flat)] = flat
    return results, None


def _whole(task: _Task, owners: np.ndarray, gathered: Mapping[str, np.ndarray]) -> LayerReport:
    """The report, from the results of all processes, each (processes, ...)."""
    kept = None
    if "eigenvalues" in gathered:
        spectra: dict[int, jax.Array] = {}
        for owner, values in enumerate(gathered["eigenvalues"]):
            layers = np.flatnonzero(owners == owner).tolist()
            parts = np.split(values, np.cumsum(_sizes(task, layers)))
            for layer, part in zip(layers, parts, strict=False):  # the last part is padding
                rows = (
                    1 if task.window is not None and task.window.divisions == "pooled" else task.grids[layer].divisions
                )
                spectra[layer] = jnp.asarray(part.reshape(rows, -1))
        kept = tuple(spectra[layer] for layer in range(len(owners)))
    return LayerReport(
        names=tuple(name for name, _ in task.layers),
        num_params=tuple(int(np.prod(leaf.shape)) for _, leaf in task.layers),
        left_out=tuple(task.left_out),
        eigenvalues=kept,
        **{metric: jnp.asarray(gathered[metric][owners, np.arange(len(owners))]) for metric in METRICS},
    )


def _together(
    work: Callable[[], tuple[dict[str, np.ndarray], T]], nothing: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], T]:
    """Do something in every process and give all results to all; an error in one is an error in all.

    Args:
        work: gives arrays to exchange, and what this process keeps for itself.
        nothing: arrays of the same shapes and dtypes, in case of an error.

    Returns:
        The arrays of all processes, each (processes, ...), and what `work` keeps.

    Raises:
        InputError: of another process.
        ValueError: of another process.
        RuntimeError: another process failed in another way.
    """
    results, kept, error = dict(nothing), None, None
    try:
        results, kept = work()
    except Exception as caught:  # the others wait: they must hear of it
        error = caught
    text = "" if error is None else f"{_kind(error)}:{error}"
    message = np.zeros(_MESSAGE, np.uint8)
    encoded = text.encode()[:_MESSAGE]
    message[: len(encoded)] = list(encoded)
    gathered = multihost_utils.process_allgather({**results, "message": message})
    if error is not None:
        raise error
    for process, other in enumerate(gathered.pop("message")):
        kind, _, told = other.tobytes().rstrip(b"\0").decode(errors="replace").partition(":")
        if kind in _TOLD:
            raise _TOLD[kind](told)
        if kind:
            raise RuntimeError(f"multihost.analyze: process {process} failed: {kind}: {told}")
    return gathered, cast(T, kept)


def _kind(error: Exception) -> str:
    return "InputError" if isinstance(error, InputError) else type(error).__name__
