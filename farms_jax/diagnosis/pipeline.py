"""diagnose(): a model on disk or in memory -> layers, read one chunk at a time -> measures -> Diagnosis."""

import dataclasses
import hashlib
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from farms_jax._axes import Axes, LeafAxes
from farms_jax._axis_rules import AxisRules
from farms_jax._default_axes import BY_NAME
from farms_jax._layers import SAY_IT, Leaf, Selection, select_layers, warn_of_undeclared
from farms_jax._modules import network_order, types
from farms_jax._names import matching, natural_key
from farms_jax.diagnosis.columns import Row
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.in_memory import open_in_memory
from farms_jax.diagnosis.measure import Measured, measure
from farms_jax.diagnosis.resampling import rank_flips
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.status import status_of, ww_status
from farms_jax.errors import AxesWarning, InputError, listed
from farms_jax.programs.cache import Cache, weights_key
from farms_jax.programs.environment import installed_versions
from farms_jax.weights import WeightSource, no_model, open_weights
from farms_jax.weights.skipped import ADAPTER

_CHUNK = 2**25  # bytes of weights measured at once, where a single layer is not larger: enough for all cores
_CACHE_FORMAT = 6  # raised when a measure changes its name or its meaning


class Place(NamedTuple):
    """Where a layer lies in a model."""

    leaf: Leaf
    at: tuple[int, ...]  # index in its stack

    @property
    def axes(self) -> LeafAxes:
        """What the axes of the layer count."""
        return self.leaf.axes.of_layer(len(self.leaf.weight.shape))

    def read(self, source: WeightSource) -> np.ndarray:
        """Read the layer."""
        return source.read_layer(self.leaf.name, self.leaf.axes, self.at)


class _Layer(NamedTuple):
    name: str
    place: Place
    digest: str  # SHA-256 of name and weights
    key: str  # in the cache
    size: int  # bytes in float32, as which it is measured
    cost: float  # of its eigenvalues, relative


def diagnose(
    model: Any,
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    axes: Any = None,
    stack: Any = None,
    cache: Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Diagnosis:
    r"""Measure every layer of a model: FARMS, the whole matrix, noise, error bars, and a status with its reason.

    Weights are read one tensor at a time, twice: once to check and hash them, once to measure those that the cache
    does not have. Memory holds one chunk of layers, or one large layer, with its windows. A layer with NaN or Inf, or
    one that cannot be read, is left out and told in `Diagnosis.damaged`; all others are measured.

    >>> import farms_jax, numpy as np
    >>> weights = {"dense": {"kernel": np.random.default_rng(0).normal(size=(64, 96))}}
    >>> diagnosis = farms_jax.diagnose(weights)
    >>> diagnosis.column("status")
    ['undertrained']

    Args:
        model: path of a checkpoint (see `farms_jax.open_weights`), an open `WeightSource`, a pytree of arrays (a module
            of Equinox, Flax's variables, a train state), a module of NNX, a bound one of Linen, or a module or state
            dict of Torch, on any device.
        include: regular expressions of layer names, matched whole; without any, all layers.
        exclude: regular expressions of layer names to leave out, matched whole.
        axes: what the axes of the weights count, as `analyze` takes it; by default those of the format, or of the
            framework.
        stack: which of them count layers, experts or seeds, as `analyze` takes it.
        cache: folder of earlier results, by hash of the weights; `None` keeps nothing.
        progress: show progress bars, where the standard error is a terminal.
        **settings: fields of `farms_jax.diagnosis.Settings`.

    Returns:
        The diagnosis.

    Raises:
        InputError: the model cannot be read, has no layer, or none without NaN or Inf.
        ValueError: a setting is out of its range, or a pattern matches nothing.
    """
    chosen = Settings(**settings)
    start = time.time()
    with opened(model, axes, stack) as source:
        places, left_out = layers_of(source, chosen, include, exclude)
        if not places:
            raise InputError(_nothing_to_measure(source, left_out))
        layers, damaged = _hashed(source, places, chosen, progress=progress)
        if not layers:
            told = listed([f"{name} ({reason})" for name, reason in damaged.items()], 5, ", ")
            raise InputError(f"{source.path}: no layer that can be measured: {told}; take an earlier checkpoint")
        store = Cache(cache)
        found = {layer.name: kept for layer in layers if (kept := _restored(store.get(layer.key))) is not None}
        cached = len(found)
        missing = [layer for layer in layers if layer.name not in found]
        for layer, measured in _measured(source, missing, chosen, progress=progress):
            content = {"row": measured.row, "deviations": measured.deviations.tolist()}
            store.put(layer.key, content | {"histogram": measured.histogram._asdict()})
            found[layer.name] = measured
        order = network_order(sorted(found, key=natural_key), source.listed if source.in_order else ())
        kinds = types(
            order, {name: min(place.leaf.shape[-2:]) for name, place in places.items() if place.leaf.is_kernel}
        )
        facts = {
            "path": str(source.path),
            "format": source.format,
            "weights_sha256": hashlib.sha256("".join(layer.digest for layer in layers).encode()).hexdigest(),
            "num_arrays": len(source.tensors),
            "num_params": source.num_params,
            "quantisation": source.quantisation,
            "damaged": damaged,
            "from_cache": cached,
            "date": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(start)),
            "seconds": time.time() - start,
            "versions": installed_versions("farms-jax", "jax", "numpy"),
            "machine": platform.machine(),
        }
        return Diagnosis(
            model=source.name,
            layers=_rows({name: found[name] for name in order}, dict(zip(order, kinds, strict=True)), chosen),
            left_out=(*left_out, *damaged.items()),
            settings=dataclasses.asdict(chosen) | {"axes": _shown(source.axes), "stack": _shown(source.stack)},
            facts=facts,
            histograms={layer.name: found[layer.name].histogram for layer in layers},
        )


def _nothing_to_measure(source: WeightSource, left_out: Iterable[tuple[str, str]]) -> str:
    """Return why a model has no layer: the reason of most of its matrices, such as their quantisation."""
    if ADAPTER in source.skipped.values():
        return no_model(source.path)
    vectors = {name for name, tensor in source.tensors.items() if len(tensor.shape) < 2}
    told = [reason for name, reason in left_out if name not in vectors] or [reason for _, reason in left_out]
    ((reason, count),) = Counter(told).most_common(1)
    among = f"no layer to measure among its {len(source.tensors)} arrays"
    return f"{source.path}: {among}; {count} left out ({reason}); see --explain"


def layers_of(
    source: WeightSource, settings: Settings, include: str | Iterable[str] = (), exclude: str | Iterable[str] = ()
) -> tuple[dict[str, Place], tuple[tuple[str, str], ...]]:
    """Return the layers of a model by name, in natural order, and (name, reason) of every other array.

    Reads headers only. `include` and `exclude` are regular expressions; one that matches nothing is a ValueError. A
    pattern of `include` that matches no layer asks for what is left out else: averages, eight-bit floats as they are.
    """
    if source.doubt:
        warnings.warn(f"{source.doubt}; where that is wrong, {SAY_IT}", AxesWarning, stacklevel=3)
    refused = {**source.skipped, **source.unread}
    selection = _selected(source, refused, settings, exclude)
    if not selection.leaves and (name := _only_matrix(source, refused, selection)):
        warnings.warn(
            f"{name} is the only matrix here: it is measured whatever its name says", AxesWarning, stacklevel=3
        )
        source.declare(AxisRules({re.escape(name): "IO"}, default=None))
        selection = _selected(source, refused, settings, exclude)
    asked = _asked_for(source, _places(selection), include)
    if asked:
        refused = {name: reason for name, reason in refused.items() if name not in asked}
        selection = _selected(source, refused, settings, exclude)
    layers = _places(selection)
    left_out = dict(selection.left_out) | dict.fromkeys(selection.excluded, "excluded")
    names = [*source.tensors, *(name for name in layers if name not in source.tensors)]
    included = matching(names, include, "include") if include else set(names)
    warn_of_undeclared(
        [pair for pair in selection.undeclared if pair[0] in included],
        [leaf for leaf in selection.leaves if included & {leaf.name, *leaf.layers}],
    )
    # Where several reasons hold, the last of these is told.
    for name in names:
        leaf = layers[name].leaf.name if name in layers else name
        if not included & {name, leaf}:
            left_out[name] = "not included"
    left_out |= refused
    chosen = {name: place for name, place in layers.items() if not left_out.keys() & {name, place.leaf.name}}
    held = {place.leaf.name for place in layers.values()}  # whose layers are named one by one
    told = [name for name in names if name in left_out and (name in layers or name not in held)]
    return chosen, tuple((name, left_out[name]) for name in told)


def _selected(
    source: WeightSource, refused: Mapping[str, str], settings: Settings, exclude: str | Iterable[str]
) -> Selection:
    """Return which of a model's arrays are layers, among all but those that are refused."""
    # What is declared is said of the weights: a pattern may match optimiser states too, of whatever rank.
    weights = {name: tensor for name, tensor in source.tensors.items() if name not in refused}
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    patterns = [p for p in patterns if not matching(refused, p, strict=False) or matching(weights, p, strict=False)]
    leaves, chosen = list(weights.items()), (settings.window, settings.tail, source.axes, patterns)
    return select_layers(leaves, *chosen, stack=source.stack, params=weights, thin=True)


def _only_matrix(source: WeightSource, refused: Mapping[str, str], selection: Selection) -> str | None:
    """Return the one matrix of a model that has no other array than vectors, where only its name is against it."""
    named = [name for name, tensor in source.tensors.items() if len(tensor.shape) > 1]
    if len(named) != 1 or refused or len(source.tensors[named[0]].shape) != 2:
        return None
    return named[0] if dict(selection.left_out).get(named[0]) in BY_NAME else None


def _places(selection: Selection) -> dict[str, Place]:
    return {name: Place(leaf, index) for leaf in selection.leaves for name, index in leaf.indexed_layers()}


def _asked_for(source: WeightSource, layers: Mapping[str, Place], include: str | Iterable[str]) -> set[str]:
    """Return the arrays that are left out unless asked for, and are: by a pattern that matches no layer."""
    names = {*layers, *(place.leaf.name for place in layers.values())}
    patterns = (include,) if isinstance(include, str) else include
    asking = [p for p in patterns if not matching(names, p, strict=False)]
    return matching(source.optional, asking, "include", strict=False)


def _shown(axes: Any) -> Any:
    """Return a declaration of axes for JSON."""
    if callable(axes):
        return getattr(axes, "__name__", repr(axes))
    if isinstance(axes, Axes | AxisRules):
        return {name: _shown(value) for name, value in dataclasses.asdict(axes).items()}
    if isinstance(axes, Mapping):
        return {name: "none" if value is None else _shown(value) for name, value in axes.items()}
    return axes if axes is None or isinstance(axes, str | int | tuple) else repr(axes)


def opened(model: Any, axes: Any = None, stack: Any = None) -> AbstractContextManager[WeightSource]:
    """Return any model as a source of weights for a `with` block, which closes it only if it was opened here.

    Without `axes`, a checkpoint has those of its format, a model in memory those of its framework; an open source takes
    them over.
    """
    if isinstance(model, WeightSource):
        model.declare(axes, stack)
        return nullcontext(model)
    if isinstance(model, str | Path):
        return open_weights(model, axes=axes, stack=stack)
    return open_in_memory(model, axes, stack)


def _hashed(
    source: WeightSource, places: Mapping[str, Place], settings: Settings, *, progress: bool
) -> tuple[list[_Layer], dict[str, str]]:
    """Read the layers once, before any long work: those to measure, and name -> fault of those that cannot be."""
    layers, damaged = [], {}
    # A bound on memory does not change a result.
    relevant = dataclasses.replace(settings, max_batch_bytes=1)
    bar = tqdm(places.items(), desc="read", unit="layer", leave=False, disable=None if progress else True)
    for name, place in bar:
        try:
            weight = place.read(source)
        except InputError as error:
            damaged[name] = str(error).removeprefix(f"{source.path}: ")
            continue
        if bad := weight.size - np.count_nonzero(np.isfinite(weight)):
            damaged[name] = f"{bad:,} of {weight.size:,} values {'is' if bad == 1 else 'are'} NaN or Inf"
            continue
        digest = weights_key({name: weight})
        key = weights_key({}, digest, _CACHE_FORMAT, version("farms-jax"), relevant, place.axes)
        _, _, rows, cols = place.leaf.shape
        layers.append(_Layer(name, place, digest, key, 4 * weight.size, float(weight.size) * min(rows, cols)))
    return layers, damaged


def _measured(
    source: WeightSource, layers: list[_Layer], settings: Settings, *, progress: bool
) -> Iterator[tuple[_Layer, Measured]]:
    # The time left goes by the cost of the layers, not by their number.
    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    total, title = sum(layer.cost for layer in layers), f"measure {len(layers)} layers"
    with tqdm(total=total, desc=title, bar_format=form, disable=None if progress else True) as bar:
        for chunk in _chunks(layers):
            weights = {layer.name: layer.place.read(source) for layer in chunk}
            measured = measure(weights, {layer.name: layer.place.axes for layer in chunk}, settings, overwrite=True)
            del weights  # before the next chunk is read
            for layer in chunk:
                yield layer, measured[layer.name]
                bar.update(layer.cost)


def _chunks(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Yield the layers in order, in groups of at most `_CHUNK` bytes, or of one larger layer."""
    chunk, size = [], 0
    for layer in layers:
        if chunk and size + layer.size > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(layer)
        size += layer.size
    if chunk:
        yield chunk


def _rows(found: Mapping[str, Measured], kinds: Mapping[str, str], settings: Settings) -> tuple[Row, ...]:
    """Return the complete rows of all layers in their order, with types, ranks among the others, and statuses."""
    rows: list[dict[str, Any]] = [
        {"layer": name, "type": kinds[name], "place": place, **measured.row}
        for place, (name, measured) in enumerate(found.items(), start=1)
    ]
    if settings.resamples:
        alphas = np.array([row["alpha"] for row in rows], float)
        draws = np.stack([measured.deviations for measured in found.values()])
        ranks = rank_flips(alphas, draws, settings.level)
        for row, rank, low, high, flips in zip(rows, *ranks, strict=True):
            row |= {"rank": int(rank), "rank_low": int(low), "rank_high": int(high), "rank_flips": float(flips)}
    for row in rows:
        row["status"], row["reason"] = status_of(row)
        row["ww_status"] = ww_status(row)
    return tuple(rows)


def _restored(kept: Any) -> Measured | None:
    """Return a layer's measures from what the cache has of it; `None` for nothing or damaged content."""
    try:
        histogram = Histogram.from_json(kept["histogram"])
        return Measured(dict(kept["row"]), np.asarray(kept["deviations"], float), histogram)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
