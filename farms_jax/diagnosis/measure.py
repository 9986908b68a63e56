"""measure(): weights of a few layers -> every number of their rows."""

import dataclasses
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from farms_jax._analyze import needs_small_eigenvalues
from farms_jax._axes import Axes, LeafAxes, as_matrices
from farms_jax._layers import too_few
from farms_jax._scaling import in_range
from farms_jax._tail import Tail, TailFit, highest_alpha, without_flat
from farms_jax._windows import Grid, make_grid
from farms_jax.diagnosis.alternatives import tail_measures
from farms_jax.diagnosis.columns import MEDIAN
from farms_jax.diagnosis.noise import excess_kurtosis, grid_level, heavy_alpha, noise_band
from farms_jax.diagnosis.resampling import deviations, interval, interval_grid
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import (
    BULK,
    Histogram,
    bulk_measures,
    histogram,
    resolved,
    shuffled_measures,
    spectrum_measures,
)
from farms_jax.diagnosis.structure import HEAVY, MEAN, numerical_rank, repeated, sample, structure_of
from farms_jax.diagnosis.tail_fits import fit_spectra
from farms_jax.solvers.cpu import cores
from farms_jax.solvers.dispatch import Solver, window_eigenvalues

_RESOLVED = 1e-10  # of the largest eigenvalue: below it Gram matrices in float64 lose a singular value's sixth digit
_FIRST_WINDOWS = 16  # of an adaptive measure; each round after that doubles them
_BY_CHANCE = 16  # squared deviations of the largest of a layer's rows: see `_shuffles`
_SHUFFLED, _MOST_SHUFFLES = 2**21, 32  # entries of a layer that are shuffled in all, and how often at most
_SHUFFLE, _RESAMPLE, _ORDER, _NOISE, _BOOTSTRAP = range(5)  # uses of random numbers, each with a stream of its own


class Measured(NamedTuple):
    """What was measured of one layer."""

    row: dict[str, Any]  # columns of `columns.COLUMNS` that do not depend on other layers: no name, status, rank
    deviations: np.ndarray  # of alpha from its mean over resamples, shape (B,); empty without resamples
    histogram: Histogram  # spectra of windows and whole matrix


class _Layer(NamedTuple):
    name: str
    shape: tuple[int, ...]
    stack: np.ndarray  # (K, R, C), to be multiplied by 2**exponent
    exponent: int
    eps: float  # of the weight's own dtype
    is_kernel: bool
    grid: Grid  # windows of the estimate
    intervals: Grid  # windows that are resampled for the interval

    def is_thin(self, settings: Settings) -> bool:
        """Return whether it has too few eigenvalues for a tail: nothing is fitted then, and no noise set beside it."""
        return bool(too_few(self.stack.shape, self.grid, settings.window, settings.tail))

    @property
    def whole(self) -> Grid:
        return make_grid(None, self.stack.shape, is_kernel=self.is_kernel)

    def generator(self, settings: Settings, use: int) -> np.random.Generator:
        """Return a generator whose draws depend only on the seed, the layer's name and their use."""
        # Not `hash`, which differs from process to process.
        return np.random.default_rng([settings.seed, zlib.crc32(self.name.encode()), use])


_Values = dict[tuple[str, Grid], np.ndarray]  # eigenvalues (K * W, n) of a layer's windows


def measure(
    weights: Mapping[str, np.ndarray],
    axes: Axes | Mapping[str, LeafAxes],
    settings: Settings,
    *,
    overwrite: bool = False,
) -> dict[str, Measured]:
    """Return the measures of layers by name: windows, whole matrices, the same shuffled, and the uncertainty of alpha.

    The weights hold one layer each, and are finite; `axes` are those of all or of each. With `overwrite` they are
    shuffled in place, which saves the memory of a copy. Numbers of the windows are those of `farms_jax.analyze`.
    """
    layers = [
        _layer(name, weight, axes.of(weight.ndim) if isinstance(axes, Axes) else axes[name], settings)
        for name, weight in weights.items()
    ]
    values: _Values = {}
    if settings.tolerance is not None:
        layers = [_adapted(layer, values, settings, settings.tolerance) for layer in layers]
    _solve(layers, values, settings)
    with ThreadPoolExecutor(cores()) as pool:  # before they are shuffled in place
        exact = list(pool.map(lambda layer: _exact(layer, values, settings), layers))
    shuffled = {}
    if settings.whole and settings.randomize:
        counts = {layer.name: own.shuffles for layer, own in zip(layers, exact, strict=True)}
        shuffled = _shuffled_spectra(layers, counts, settings, overwrite)
    return {
        layer.name: _measured(layer, values, own, shuffled.get(layer.name), settings)
        for layer, own in zip(layers, exact, strict=True)
    }


def _layer(name: str, weight: np.ndarray, axes: LeafAxes, settings: Settings) -> _Layer:
    dtype = weight.dtype if weight.dtype.char in "fdFD" else np.dtype(np.float32)  # half precisions
    (stack,) = as_matrices(np.asarray(weight, dtype), axes)
    stack, exponent = in_range(stack)
    is_kernel = axes.is_kernel(weight.ndim)
    grid = make_grid(settings.window, stack.shape, is_kernel=is_kernel)
    intervals = interval_grid(grid, stack.shape) if settings.resamples else grid
    eps = float(jnp.finfo(weight.dtype).eps) if jnp.issubdtype(weight.dtype, jnp.inexact) else 0.0
    return _Layer(name, weight.shape, stack, exponent, eps, is_kernel, grid, intervals)


def _solve(layers: list[_Layer], values: _Values, settings: Settings) -> None:
    """Add the eigenvalues of all windows that `values` lacks; no window of a layer is solved twice."""
    by_name = {layer.name: layer for layer in layers}
    wanted: dict[tuple[str, Grid], Solver] = {}
    for layer in layers:
        if settings.whole:
            wanted[layer.name, layer.whole] = "gram64"
        for grid in (layer.grid, layer.intervals):
            wanted.setdefault((layer.name, grid), _window_solver(settings))
    for kind in ("gram", "gram64"):
        keys = [key for key, solver in wanted.items() if solver == kind and key not in values]
        found = _eigenvalues([by_name[name] for name, _ in keys], [grid for _, grid in keys], kind, settings)
        values.update(zip(keys, found, strict=True))
    # Ranks and the smallest singular values are beyond a Gram matrix where few directions are missing or nearly so.
    for layer in layers if settings.whole else ():
        solved = values[layer.name, layer.whole]
        if (solved[:, 0] < _RESOLVED * solved.max()).any() and solved.max() > 0:
            exact = layer.stack.astype(np.result_type(layer.stack.dtype, np.float64), copy=False)
            (found,) = _eigenvalues([layer._replace(stack=exact)], [layer.whole], "svd", settings)
            values[layer.name, layer.whole] = found


def _window_solver(settings: Settings) -> Solver:
    return "gram64" if needs_small_eigenvalues(settings.tail) else "gram"


def _eigenvalues(layers: list[_Layer], grids: list[Grid], solver: Solver, settings: Settings) -> list[np.ndarray]:
    stacks, platform = [layer.stack for layer in layers], jax.default_backend()
    found = window_eigenvalues(stacks, grids, platform=platform, solver=solver, max_bytes=settings.max_batch_bytes)
    # In float64 they fit whatever the exponent of a float32 weight is.
    return [
        values.astype(np.float64) * 4.0**layer.exponent if layer.exponent else values
        for values, layer in zip(found, layers, strict=True)
    ]


class _Exact(NamedTuple):
    """What needs the weights themselves, before they are shuffled in place."""

    columns: dict[str, Any]
    live: tuple[int, int]  # rows and columns that are not zero
    shuffles: int  # how many tell what is there by chance
    across: np.ndarray | None  # see `_across`


def _median(tail: Tail) -> Tail:
    """Return the rule that verdicts go by: the others find a new threshold in every draw of noise."""
    return dataclasses.replace(tail, xmin="median")


def _exact(layer: _Layer, values: _Values, settings: Settings) -> _Exact:
    stack, tail, grid = layer.stack, _median(settings.tail), layer.grid
    entries, across, whole, largest = sample(stack), _across(stack), None, None
    if settings.whole:
        whole = values[layer.name, layer.whole]
        largest = whole.max(1) / 4.0**layer.exponent if across is None else across[-1:]
    columns, live = structure_of(stack, entries, 2.0**layer.exponent, largest)
    columns |= dict.fromkeys(("noise_alpha", "noise_low", "noise_high", "heavy_alpha"))
    thin = layer.is_thin(settings)
    if not thin:
        columns["noise_alpha"] = grid_level(grid, tail)
        columns["heavy_alpha"] = heavy_alpha(grid.gram_rows / max(grid.rows, grid.cols), tail.xmin_pos)
    if not thin and columns["zeros"] < 1:
        if settings.window is not None and settings.window.divisions == "pooled":
            grid = grid._replace(divisions=1)
        band = noise_band(entries, stack.shape, live, grid, tail, layer.generator(settings, _NOISE))
        columns |= {"noise_alpha": band.level, "noise_low": band.low, "noise_high": band.high}
        if band.kurtosis and not columns["structure"]:
            columns["structure"] = f"{HEAVY} (excess kurtosis {band.kurtosis:.3g})"
    if whole is not None:
        rank = numerical_rank(whole, stack.shape, layer.eps)
        columns["numerical_rank"] = rank
        if 0 < rank < whole.size and not columns["structure"]:
            columns["structure"] = repeated(stack)
    shuffles = _shuffles(entries, stack) if settings.whole and settings.randomize else 0
    return _Exact(columns, live, shuffles, across)


def _across(stack: np.ndarray) -> np.ndarray | None:
    """Return the eigenvalues (K,), ascending, of a depthwise kernel (K, R, C) as one matrix, positions by channels.

    Its matrices of one row say nothing of what channels share. `None` of any other layer.
    """
    if len(stack) == 1 or min(stack.shape[1:]) > 1:
        return None
    matrix = stack.reshape(len(stack), -1).astype(np.result_type(stack.dtype, np.float64))
    return np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2


def _shuffles(entries: np.ndarray, stack: np.ndarray) -> int:
    """Return how often a layer (K, R, C) has to be shuffled, to know which eigenvalues beyond the bulk are chance.

    Entries of excess kurtosis k, in rows of C, have rows whose squared norms scatter by sqrt((k + 2) / C) of their
    mean. One that is larger than the mean by sqrt(R / C) of it is a spike (Baik, Ben Arous and Peche 2005), and where
    the largest of all rows, 4 deviations off, may be that, it is another in every order: where (k + 2) 16 > R. The
    same holds of columns.
    """
    if (excess_kurtosis(entries) + 2) * _BY_CHANCE < min(stack.shape[1:]):
        return 1
    return min(max(_SHUFFLED // stack.size, 1), _MOST_SHUFFLES)


def _measured(
    layer: _Layer,
    values: _Values,
    exact: _Exact,
    shuffled: np.ndarray | None,
    settings: Settings,
) -> Measured:
    scale = settings.kernel_scale if layer.is_kernel else 1.0
    windows = values[layer.name, layer.grid] * scale
    shorter, longer = sorted(layer.stack.shape[1:])
    row = {
        "shape": "x".join(map(str, layer.shape)),
        "num_params": layer.stack.size,
        "N": longer,
        "M": shorter,
        "Q": longer / shorter,
        **exact.columns,
    }
    found, scatter = _window_columns(layer, windows, values, settings)
    row, whole = row | found, None
    if settings.tail.xmin != "median":
        by_median = dataclasses.replace(settings, tail=_median(settings.tail))
        found, _ = _window_columns(layer, windows, values, by_median)
        row |= {MEDIAN[name]: value for name, value in found.items() if name in MEDIAN}
    if settings.whole:
        positions = values[layer.name, layer.whole] * scale
        whole = np.sort(positions, axis=None)
        fit = _fits(resolved(whole)[None], longer, shorter, settings.tail)
        alpha = None if layer.is_thin(settings) else float(fit.alpha[0]) or None  # 0: no tail
        bias = alpha - row["alpha"] if alpha and row["alpha"] else None
        row |= {"whole_alpha": alpha, "aspect_ratio_bias": bias}
        row |= spectrum_measures(positions, *layer.stack.shape[1:])
        if layer.is_thin(settings):
            row |= dict.fromkeys(BULK)
        elif exact.across is None:
            # A mean that all share is there in any order too.
            chance = None if shuffled is None or MEAN in row["structure"] else shuffled * scale
            row |= bulk_measures(whole, layer.stack.shape[1:], exact.live, chance)
        else:
            shape = (len(layer.stack), longer)
            row |= bulk_measures(np.resize(exact.across, min(shape)) * scale * 4.0**layer.exponent, shape, shape)
        if row["mp_sigma"]:
            row["mp_sigma"] /= scale**0.5  # of the weight's own entries
        if settings.alternatives or settings.bootstrap:
            rng, samples = layer.generator(settings, _BOOTSTRAP), settings.bootstrap
            row |= tail_measures(whole, alternatives=settings.alternatives, samples=samples, rng=rng)
        if shuffled is not None:
            row |= shuffled_measures(whole, shuffled[0] * scale, *layer.stack.shape[1:])
    return Measured(row, scatter, histogram(windows.ravel(), whole))


def _fits(spectra: np.ndarray, rows: int, cols: int, tail: Tail) -> TailFit:
    """Return fits to spectra (S, E) of windows of `rows` x `cols`; no rule finds a tail where the median rule has none.

    Of eigenvalues that are equal but for rounding the others fit that, with an alpha of 1e14.
    """
    fits = without_flat(fit_spectra(spectra, tail), highest_alpha(rows, cols, tail))
    if tail.xmin == "median":
        return fits
    return without_flat(fits, np.where(_fits(spectra, rows, cols, _median(tail)).alpha > 0, np.inf, 0))


def _window_columns(
    layer: _Layer, windows: np.ndarray, values: _Values, settings: Settings
) -> tuple[dict[str, Any], np.ndarray]:
    """Return FARMS's columns, means over the divisions of a kernel as in `analyze`, and alpha's deviations (B,)."""
    grid, tail = layer.grid, settings.tail
    pooled = grid.pool(windows)
    if settings.window is not None and settings.window.divisions == "pooled":
        pooled = pooled.reshape(1, -1)
    pooled = np.sort(pooled.astype(np.float64), axis=-1)
    fits = _fits(pooled, grid.rows, grid.cols, tail)
    alphas, distances, starts = (np.asarray(part) for part in fits[:3])
    thin = layer.is_thin(settings)
    found = (alphas > 0) & (not thin)
    columns = {
        "alpha": float(alphas[found].mean()) if found.any() else None,
        "num_windows": windows.shape[0],
        "ks_distance": None if thin else float(distances.mean()),
        "xmin": float(starts[found].mean()) if found.any() else None,
        "num_tail": None if thin else int((pooled[found] >= starts[found, None]).sum()),
    }
    if not settings.resamples:
        return columns, np.zeros(0)
    scatter = _scatter(layer, values[layer.name, layer.intervals], settings)
    columns |= {"alpha_low": None, "alpha_high": None}
    if columns["alpha"] is not None and scatter.any():
        low, high = interval(columns["alpha"], scatter, settings.level)
        columns |= {"alpha_low": max(low, 1.0), "alpha_high": high}  # no alpha is below 1
    return columns, scatter


def _scatter(layer: _Layer, windows: np.ndarray, settings: Settings) -> np.ndarray:
    """Return deviations (B,) of the layer's alpha over resamples of windows (K * W, n)."""
    grids, rng = (layer.intervals, layer.grid), layer.generator(settings, _RESAMPLE)
    return deviations(windows, settings.tail, grids, len(layer.stack), settings.resamples, rng)


def _shuffled_spectra(
    layers: list[_Layer], counts: Mapping[str, int], settings: Settings, overwrite: bool
) -> dict[str, np.ndarray]:
    """Return eigenvalues (B, E), ascending, of each layer's matrices in B random orders of their entries."""
    generators = {layer.name: layer.generator(settings, _SHUFFLE) for layer in layers}

    def shuffle(layer: _Layer) -> _Layer:
        stack = layer.stack
        if not (overwrite and stack.flags.c_contiguous and stack.flags.writeable):
            stack = np.array(stack, order="C")
        for matrix in stack:
            generators[layer.name].shuffle(matrix.reshape(-1))
        return layer._replace(stack=stack)

    spectra: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    with ThreadPoolExecutor(cores()) as threads:
        while layers:
            layers = list(threads.map(shuffle, layers))
            found = _eigenvalues(layers, [layer.whole for layer in layers], "gram", settings)
            for layer, values in zip(layers, found, strict=True):
                spectra[layer.name].append(np.sort(values.ravel()))
            layers = [layer for layer in layers if len(spectra[layer.name]) < counts[layer.name]]
    return {name: np.stack(found) for name, found in spectra.items()}


def _adapted(layer: _Layer, values: _Values, settings: Settings, tolerance: float) -> _Layer:
    """Return a layer with windows added until its interval is narrow enough, and add their eigenvalues to `values`.

    A layer whose windows are more than half as high as its matrix stays as it is: too few of them differ.
    """
    if layer.is_kernel or layer.grid.rows > min(layer.stack.shape[1:]) // 2:
        return layer
    order = layer.generator(settings, _ORDER).permutation(np.array(layer.grid.starts))
    starts = tuple((row, col) for row, col in order.tolist())
    solved, count = np.zeros((0, layer.grid.gram_rows)), 0
    while count < len(starts):
        count = min(max(2 * count, _FIRST_WINDOWS), len(starts))
        more = layer.grid._replace(starts=starts[len(solved) : count])
        (part,) = _eigenvalues([layer], [more], _window_solver(settings), settings)
        solved = np.concatenate([solved, part])
        grid = layer.grid._replace(starts=starts[:count])
        layer = layer._replace(grid=grid, intervals=grid)
        low, high = interval(0.0, _scatter(layer, solved, settings), settings.level)
        if 0 < (high - low) / 2 <= tolerance:
            break
    values[layer.name, layer.grid] = solved
    return layer
