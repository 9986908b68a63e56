"""Power-law tail of a spectrum: the threshold, alpha and how well they fit.

The tail is every eigenvalue from the threshold `xmin` on, including the threshold. With n of them, e_i the threshold
and l = ln e,

    alpha = 1 + n / sum_{j >= i} (l_j - l_i)                    Hill's estimate (paper, equation 2)
    D     = max_k |1 - (e_{i+k} / e_i)^(1 - alpha) - k / n|     Kolmogorov-Smirnov distance, one-sided

Everything is computed from logarithms relative to the largest eigenvalue, so that float32 sums stay exact where the
tail is short.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from farms_jax._scaling import times_power
from farms_jax.marchenko_pastur import hill_alpha

_ROUNDING = 8  # units in the last place by which rounding may set equal numbers apart


@dataclasses.dataclass(frozen=True)
class Tail:
    """Rule that finds where the power-law tail of a spectrum starts.

    Attributes:
        xmin: `"median"` takes the eigenvalue at position `int(N / xmin_pos)` of N; `"ks"` tries every eigenvalue
            but the last and takes the one with the smallest KS distance (the first on ties); `"peak"` does so
            among those near the peak x of the histogram of log10(eigenvalue): `log10(0.95 x) <= e <= 1.5 x`.
            The lower bound of `peak` compares a logarithm with an eigenvalue, as the reference code does, on which
            its published numbers rest. It cuts nothing where x < 1.05, and little elsewhere.
        xmin_pos: position of the median rule, above 1; 2 is the middle, the upper one of an even count.
        bins: histogram bins of the peak rule.
        min_eigenvalue: leave out eigenvalues up to this (the reference's filter uses 1e-5); if that leaves none,
            all are kept. `None` keeps all.
        min_count: a layer whose fits have fewer eigenvalues is left out; a fit has those of one division, or all where
            divisions are pooled, before the filter.
        flat: for the median rule, an alpha above this many times that of noise in windows of the same shape counts as
            no tail: the eigenvalues are nearly equal. `None`, as in the reference, for no such bound.

    Raises:
        ValueError: a value out of its range.
    """

    xmin: Literal["median", "peak", "ks"] = "median"
    xmin_pos: float = 2.0
    bins: int = 100
    min_eigenvalue: float | None = None
    min_count: int = 5
    flat: float | None = 3.0

    def __post_init__(self):
        if self.xmin not in {"median", "peak", "ks"}:
            raise ValueError(f"Tail: xmin must be 'median', 'peak' or 'ks', got {self.xmin!r}")
        if self.flat is not None and not self.flat > 1:
            raise ValueError(f"Tail: flat must be above 1, got {self.flat}")
        if not self.xmin_pos > 1:
            raise ValueError(f"Tail: xmin_pos must be above 1, got {self.xmin_pos}")
        for field, least in (("bins", 1), ("min_count", 2)):
            if getattr(self, field) < least:
                raise ValueError(f"Tail: {field} must be at least {least}, got {getattr(self, field)}")


class TailFit(NamedTuple):
    """Fit of one spectrum; every field has shape () or the batch's shape.

    Attributes:
        alpha: exponent of the power law, above 1; 0 where there is no tail to fit.
        ks_distance: D, in [0, 1]; 1 where there is no tail to fit.
        xmin: threshold eigenvalue; 0 where there is no tail to fit.
        num_eigenvalues: eigenvalues kept by the filter, int32.
    """

    alpha: Array
    ks_distance: Array
    xmin: Array
    num_eigenvalues: Array


def highest_alpha(rows: int, cols: int, tail: Tail) -> float:
    """Return the alpha above which windows of this shape have no tail, see `Tail.flat`.

    An orthogonal matrix, as which recurrent kernels begin, has equal eigenvalues; a step later they differ by little,
    and Hill's estimate is in the hundreds. Only for the median rule: the others choose their threshold by the spectrum.
    """
    if tail.xmin != "median" or tail.flat is None:
        return math.inf
    return tail.flat * hill_alpha(min(rows, cols) / max(rows, cols), tail.xmin_pos)


def without_flat(fits: TailFit, highest: Any) -> TailFit:
    """Return fits, arrays of NumPy or JAX, with no tail where alpha is above `highest`, which broadcasts to them."""
    xp = np if isinstance(fits.alpha, np.ndarray) else jnp  # JAX would take NumPy's float64 for float32
    is_flat = fits.alpha > highest
    none = xp.zeros_like(fits.alpha)
    return fits._replace(
        alpha=xp.where(is_flat, none, fits.alpha),
        ks_distance=xp.where(is_flat, 1, fits.ks_distance),
        xmin=xp.where(is_flat, none, fits.xmin),
    )


class _Spectrum(NamedTuple):
    """Eigenvalues (E,) ascending, logarithms relative to the largest, and the index of the first kept and usable.

    `in_units` are the eigenvalues times 2^power: 0 or infinite where they are beyond the dtype's range.
    """

    eigenvalues: Array
    logs: Array
    kept_from: Array
    usable_from: Array
    in_units: Array
    power: Array


def fit_tail(
    eigenvalues: Array, tail: Tail, size: Array | int | None = None, power: Array | int | None = None
) -> TailFit:
    """Fit the tail of one spectrum.

    There is no tail where all eigenvalues are zero, where those from the threshold on are equal to within
    rounding, or where `peak` finds no candidate. A zero eigenvalue is never a threshold: the smallest positive
    one takes its place (the reference gives nan, inf or an error in these cases).

    Args:
        eigenvalues: shape (E,), float, ascending, not negative.
        tail: the rule.
        size: number of eigenvalues that count, from the last one back; the others are padding, and zero. `None`
            counts all.
        power: the eigenvalues are to be multiplied by 2 to this power, int32: what they are compared with, and `xmin`,
            are of that size, which may be beyond their dtype's range. `None` for 0.

    Returns:
        The fit, of scalars. `jax.vmap` maps it over spectra, padded to one length where they differ.
    """
    power = jnp.zeros((), jnp.int32) if power is None else jnp.asarray(power, jnp.int32)
    spectrum = _prepare(eigenvalues, tail.min_eigenvalue, eigenvalues.size if size is None else size, power)
    kept = eigenvalues.size - spectrum.kept_from
    if tail.xmin == "median":
        # In whole numbers: in float32, N / xmin_pos may fall just short of the integer that it should be.
        fraction = Fraction(1 / tail.xmin_pos).limit_denominator(1000)
        index = spectrum.kept_from + (kept * fraction.numerator) // fraction.denominator
        index = jnp.clip(index, spectrum.usable_from, eigenvalues.size - 1)
        alpha = _alpha_at(spectrum, index)
        deviations = _deviation(spectrum.logs, index, alpha, jnp.arange(eigenvalues.size) - index)
        distance = jnp.where(alpha > 0, deviations.max(), 1.0)
    else:
        index, alpha, distance = _search(spectrum, _candidates(spectrum, tail))
    found = alpha > 0
    return TailFit(alpha, distance, jnp.where(found, spectrum.in_units[index], 0), kept.astype(jnp.int32))


def _prepare(eigenvalues: Array, min_eigenvalue: float | None, size: Array | int, power: Array) -> _Spectrum:
    in_units = times_power(eigenvalues, power)
    zeros = (eigenvalues <= 0).sum()
    kept_from = jnp.asarray(eigenvalues.size - size, zeros.dtype)
    if min_eigenvalue is not None:
        small = (in_units <= min_eigenvalue).sum()
        kept_from = jnp.where(small < eigenvalues.size, jnp.maximum(small, kept_from), kept_from)
    largest = eigenvalues[-1]
    safe = jnp.where(eigenvalues > 0, eigenvalues, jnp.where(largest > 0, largest, 1))
    unit = jnp.where(largest > 0, largest, 1)
    ratios = safe / unit
    # Beside one huge eigenvalue the ratio of another may vanish, though their logarithms exist.
    logs = jnp.where(ratios >= jnp.finfo(ratios.dtype).tiny, jnp.log(ratios), jnp.log(safe) - jnp.log(unit))
    return _Spectrum(eigenvalues, logs, kept_from, jnp.maximum(zeros, kept_from), in_units, power)


def _hill(count: Array, spread: Array) -> Array:
    """Return Hill's alpha of `count` eigenvalues, from the sum of l_j - l_i; 0 where all are equal but for rounding."""
    flat = spread <= _ROUNDING * float(jnp.finfo(spread.dtype).eps) * count
    return jnp.where(flat, 0, 1 + count / jnp.where(flat, 1, spread))


def _alpha_at(spectrum: _Spectrum, index: Array) -> Array:
    logs = spectrum.logs
    size = logs.size
    in_tail = (jnp.arange(size) >= index) & (spectrum.eigenvalues[-1] > 0)
    spread = jnp.where(in_tail, logs - logs[index], 0).sum()
    return _hill((size - index).astype(logs.dtype), spread)


def _all_alphas(logs: Array) -> Array:
    """Return alpha of the tail from each index on, shape (E,)."""
    size = logs.size
    count = (size - jnp.arange(size)).astype(logs.dtype)
    sums = lax.cumsum(logs, reverse=True)
    return _hill(count, sums - count * logs)


def _deviation(logs: Array, index: Array, alpha: Array, offset: Array) -> Array:
    """Return |1 - (e_{i+k} / e_i)^(1 - alpha) - k / n| for tails from i on at offsets k, elementwise; 0 where k < 0."""
    ratio = logs[jnp.clip(index + offset, 0, logs.size - 1)] - logs[index]
    count = (logs.size - index).astype(logs.dtype)
    deviation = jnp.abs(1 - jnp.exp((1 - alpha) * ratio) - offset.astype(logs.dtype) / count)
    return jnp.where(offset >= 0, deviation, 0)


def _candidates(spectrum: _Spectrum, tail: Tail) -> Array:
    """Return which indices may be the threshold, shape (E,), bool: usable, and not the last."""
    eigenvalues, logs, _, usable_from, in_units, power = spectrum
    position = jnp.arange(logs.size)
    usable = (position >= usable_from) & (position < logs.size - 1)
    if tail.xmin == "ks":
        return usable
    log10 = logs / jnp.log(jnp.asarray(10, logs.dtype))
    shift = jnp.log10(jnp.where(eigenvalues[-1] > 0, eigenvalues[-1], 1)) + power.astype(logs.dtype) * math.log10(2)
    low = log10[jnp.minimum(usable_from, logs.size - 1)]
    width = jnp.where(low < 0, -low, 1)  # the largest eigenvalue's relative log10 is 0
    bins = jnp.clip(((log10 - low) / width * tail.bins).astype(jnp.int32), 0, tail.bins - 1)
    counts = jnp.zeros(tail.bins, jnp.int32).at[bins].add((position >= usable_from).astype(jnp.int32))
    peak = 10 ** (shift + low + jnp.argmax(counts).astype(low.dtype) * (width / tail.bins))
    return usable & (in_units >= jnp.log10(0.95 * peak)) & (in_units <= 1.5 * peak)


def _search(spectrum: _Spectrum, candidates: Array) -> tuple[Array, Array, Array]:
    """Return index, alpha and distance of the candidate with the smallest distance, the first on ties.

    Alpha is 0 and the distance 1 where there is no candidate. A candidate's deviation at any one place bounds its
    distance from below. The candidate with the lowest bound is measured in full, and the place of its largest deviation
    raises the bounds of all others, since for many of them it is nearly the worst place too. The search ends when no
    bound is below the best distance: with the result of the plain search, at O(E) memory, after some dozens of
    candidates instead of all E.
    """
    logs = spectrum.logs
    alphas = _all_alphas(logs)
    candidates &= alphas > 1
    position = jnp.arange(logs.size)
    bounds = jnp.where(candidates, jnp.zeros((), logs.dtype), jnp.inf)
    slack = _ROUNDING * float(jnp.finfo(logs.dtype).eps)  # a bound is rounded otherwise than the distance it bounds

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        bounds, best, _ = state
        return bounds.min() - slack <= best

    def measure(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bounds, best, best_index = state
        index = jnp.argmin(bounds)
        deviations = _deviation(logs, index, alphas[index], position - index)
        worst = jnp.argmax(deviations)
        distance = deviations[worst]
        better = (distance < best) | ((distance == best) & (index < best_index))
        best, best_index = jnp.where(better, distance, best), jnp.where(better, index, best_index)
        bounds = jnp.maximum(bounds, _deviation(logs, position, alphas, worst - position))
        return bounds.at[index].set(jnp.inf), best, best_index

    none = (bounds, jnp.ones((), logs.dtype), jnp.asarray(logs.size, position.dtype))
    _, best, index = lax.while_loop(unfinished, measure, none)
    found = index < logs.size
    index = jnp.minimum(index, logs.size - 1)
    return index, jnp.where(found, alphas[index], 0), jnp.where(found, best, 1)
