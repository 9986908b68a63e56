"""Analysis spread over the processes of `jax.distributed`, layer by layer.

    jax.distributed.initialize()                      # in every process, at the start
    report = farms_jax.multihost.analyze(params)      # in every process, and the same report in each

For weights that every process has or can read. Weights that lie sharded over the devices of several processes are what
`farms_jax.analyze(params, mesh=mesh)` is for.
"""

import heapq
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from farms_jax import _analyze
from farms_jax._axes import FLAX_AXES, layer_of
from farms_jax._layers import Leaf, Selection, not_finite, raise_if_not_finite, select_layers, warn_of_undeclared
from farms_jax._names import named_leaves, natural_key
from farms_jax._report import METRICS, LayerReport
from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.errors import InputError

T = TypeVar("T")


class _Failure(NamedTuple):
    """An error, as it is sent to the other processes."""

    kind: str
    message: str


def analyze(
    params: Any,
    *,
    window: Window | None = Window(),  # noqa: B008 (frozen)
    tail: Tail = Tail(),  # noqa: B008
    axes: Any = FLAX_AXES,
    stack: Any = None,
    exclude: str | Iterable[str] = (),
    **settings: Any,
) -> LayerReport:
    """Analyse a network with every process taking its share of the layers.

    All processes must call it with the same arguments. Each reads only its own layers, so leaves may be anything with
    `shape`, `dtype` and `__array__`, such as data sets of h5py. Little is exchanged: measures, errors, and eigenvalues
    where they are asked for. An error in one process is raised in all.

    >>> import farms_jax, numpy as np
    >>> report = farms_jax.multihost.analyze({"dense": np.random.default_rng(0).normal(size=(64, 32))})
    >>> report.names
    ('dense',)

    Args:
        params: see `farms_jax.analyze`; the arrays are in this process's own memory or on its own devices.
        window: see `farms_jax.analyze`.
        tail: see `farms_jax.analyze`.
        axes: see `farms_jax.analyze`.
        stack: see `farms_jax.analyze`.
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

    def read() -> tuple[Any, tuple[str, list[str]]]:
        selection = select_layers(_local_leaves(params), window, tail, axes, exclude, stack=stack, params=params)
        warn_of_undeclared(selection.undeclared, selection.leaves)
        shown = [(leaf.name, leaf.axes, tuple(leaf.weight.shape), str(leaf.weight.dtype)) for leaf in selection.leaves]
        common = sorted((key, value) for key, value in settings.items() if key != "mesh")
        owners = _assign([_cost(leaf) for leaf in selection.leaves for _ in leaf.layers])
        weights, axes_of = {}, {}
        layers = ((leaf, *layer) for leaf in selection.leaves for layer in leaf.indexed_layers())
        for (leaf, name, index), owner in zip(layers, owners, strict=True):
            if owner == jax.process_index():
                weight = layer_of(leaf.weight, leaf.axes, index)
                weights[name] = weight if isinstance(weight, jax.Array) else np.asarray(weight)
                axes_of[name] = leaf.axes.of_layer(len(leaf.weight.shape))
        given = repr((shown, selection.left_out, window, tail, common))
        return (selection, weights, axes_of), (given, not_finite(list(weights.items())))

    # Before anything is solved, which takes long: the other processes would learn of an error only at its end.
    (selection, weights, axes_of), found = _collective(read)
    if len({given for given, _ in found}) > 1:
        raise ValueError("multihost.analyze: the processes were given different models or settings; give all the same")
    raise_if_not_finite([name for name in selection.layers if any(name in bad for _, bad in found)])

    def measure() -> tuple[None, LayerReport]:
        return None, jax.device_get(_analyze.analyze(weights, window=window, tail=tail, axes=axes_of, **settings))

    _, reports = _collective(measure)
    return _merge(selection, reports).without(selection.excluded)


def _local_leaves(params: Any) -> list[tuple[str, Any]]:
    leaves = sorted(named_leaves(params), key=lambda pair: natural_key(pair[0]))
    for name, leaf in leaves:
        if isinstance(leaf, Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            where = "is traced" if isinstance(leaf, Tracer) else "lies on devices of several processes"
            raise ValueError(f"multihost.analyze: {name} {where}; call farms_jax.analyze(params, mesh=mesh)")
    return leaves


def _assign(costs: Sequence[float]) -> np.ndarray:
    """Return the process of each layer: the costliest layer first, each to the process with the least to do."""
    owners = np.zeros(len(costs), int)
    loads = [(0.0, process) for process in range(jax.process_count())]
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        load, owners[layer] = loads[0]
        heapq.heapreplace(loads, (load + costs[layer], int(owners[layer])))
    return owners


def _cost(leaf: Leaf) -> float:
    """Return the operations for a layer of a leaf, up to a factor."""
    is_complex = jnp.issubdtype(leaf.weight.dtype, jnp.complexfloating)
    return leaf.shape[1] * len(leaf.grid.starts) * leaf.grid.window_cost(is_complex=is_complex)


def _merge(selection: Selection, reports: Sequence[LayerReport]) -> LayerReport:
    """Merge the reports of all processes into one, with its layers in the order of the selection."""
    found = [name for report in reports for name in report.names]
    order = np.array([found.index(name) for name in selection.layers], int)
    spectra = [values for report in reports for values in report.eigenvalues or ()]
    num_params = [count for report in reports for count in report.num_params]
    return LayerReport(
        names=selection.layers,
        num_params=tuple(num_params[place] for place in order),
        num_positions=selection.num_positions,
        left_out=tuple(selection.left_out),
        axes=tuple(selection.axes),
        eigenvalues=None if reports[0].eigenvalues is None else tuple(jnp.asarray(spectra[place]) for place in order),
        **{
            metric: jnp.asarray(np.concatenate([getattr(report, metric) for report in reports])[order])
            for metric in METRICS
        },
    )


def _collective(work: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
    """Call `work` in every process: it returns what this process keeps, and what it shares, which is pickled.

    Returns:
        What this process keeps, and what all share, by process.

    Raises:
        InputError: raised in another process.
        ValueError: raised in another process.
        RuntimeError: another process failed in another way.
    """
    kept, shared, error = None, None, None
    try:
        kept, shared = work()
    except Exception as caught:  # the others wait: they must hear of it
        error = caught
        shared = _Failure("InputError" if isinstance(error, InputError) else type(error).__name__, str(error))
    everything = _exchange(pickle.dumps(shared))
    if error is not None:
        raise error
    for process, other in enumerate(found := [pickle.loads(message) for message in everything]):
        if isinstance(other, _Failure):
            known = {"InputError": InputError, "ValueError": ValueError}.get(other.kind)
            if known is None:
                raise RuntimeError(f"multihost.analyze: process {process} failed: {other.kind}: {other.message}")
            raise known(other.message)
    return cast(T, kept), found


def _exchange(message: bytes) -> list[bytes]:
    """Send a message to all processes; return those of all, by process."""
    lengths = np.ravel(multihost_utils.process_allgather(np.array(len(message))))
    padded = np.zeros(int(lengths.max()), np.uint8)  # `process_allgather` takes arrays of one shape
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
