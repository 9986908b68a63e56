"""Spectra -> numbers: what one layer's eigenvalues say, in float64, whichever solver found them.

Eigenvalues are those of W W^T, ascending, pooled over kernel positions and scaled as the reference and WeightWatcher do
it. Numbers that do not exist for a spectrum, such as the logarithm of a norm of 0, are `None`.

The columns that WeightWatcher has too (`Column.weightwatcher`) equal those of its version 0.7.7, but for these:
`entropy` has no 1e-10 added to its shares, which sets it apart in the seventh digit, or the fourth where one share is
nearly all; `ww_sigma` of less than 8 eigenvalues is that of `ww_alpha`, where WeightWatcher's is of an alpha of 0; a
number that WeightWatcher could not find, -1 or infinite there, is `None`; what comes of shuffling is that of one other
shuffle (of five together in WeightWatcher's `rand_num_spikes` and `max_rand_eval`, where a matrix has less than 100
rows or columns).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from farms_jax import marchenko_pastur
from farms_jax.diagnosis import weightwatcher

_WEAK = 1e-6  # eigenvalues below it count as a weak loss of rank, as in WeightWatcher
_BINS = 60
BULK = ("mp_sigma", "mp_min", "mp_max", "mp_spikes", "mp_distance", "mp_rand_spikes")
_LOOKED_AT = 8  # spikes, the largest, that are compared with those of shuffled matrices
_LEAST_STEP, _DEVIATIONS = 0.05, 3.5  # by which one has to be larger than theirs: of their mean, of their deviation
_DRAWN = 1e-8  # of the largest eigenvalue: what is smaller, rounding or no rank, is not drawn


class Histogram(NamedTuple):
    """Spectra of one layer as densities over log10(eigenvalue), ready to draw and for JSON."""

    edges: tuple[float, ...]  # log10 of the edges of B bins, B + 1 of them, evenly spaced
    windows: tuple[float, ...]  # of the pooled windows: B numbers that sum to 1 / bin width
    whole: tuple[float, ...] = ()  # of the whole matrix; empty where it was not measured

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Histogram":
        """Return what `_asdict()` became in JSON; other content is a TypeError, ValueError or AttributeError."""
        return cls(**{name: tuple(values) for name, values in content.items()})


def resolved(eigenvalues: np.ndarray) -> np.ndarray:
    """Return ascending eigenvalues (E,), as `analyze` has them: 0 below the resolution of a Gram matrix in float64."""
    floor = eigenvalues[-1] * eigenvalues.size * np.finfo(np.float64).eps
    return np.where(eigenvalues > floor, eigenvalues, 0)


def spectrum_measures(positions: np.ndarray, rows: int, cols: int) -> dict[str, Any]:
    """Return the columns of a whole matrix: `ww_alpha` to `sv_min`.

    `positions` is float64 of shape (K, E), not negative: the eigenvalues of a kernel's K matrices of `rows` x `cols`.
    """
    eigenvalues = np.sort(positions, axis=None)
    norm, largest = float(eigenvalues.sum()), float(eigenvalues[-1])
    singular, each = np.sqrt(eigenvalues), np.sqrt(positions)
    relative = max(rows, cols) * np.finfo(np.float64).eps
    rank = int((singular > singular[-1] * relative).sum())
    return {
        **_power_law(eigenvalues),
        "whole_num_eigenvalues": eigenvalues.size,
        "whole_norm": norm,
        "whole_log_norm": _log10(norm),
        "whole_largest_eigenvalue": largest,
        "whole_log_largest_eigenvalue": _log10(largest),
        "whole_stable_rank": norm / largest if largest > 0 else None,
        "effective_rank": float(np.exp(_entropy(singular))) if largest > 0 else None,
        "entropy": _entropy(eigenvalues) / float(np.log(rank)) if rank > 1 else None,
        "matrix_rank": rank,
        "rank_loss": int((each <= each.max(1, keepdims=True) * relative).sum()),
        "weak_rank_loss": int((eigenvalues < _WEAK).sum()),
        "sv_max": float(singular[-1]),
        "sv_min": float(each.min(1).max()),
    }


def _power_law(eigenvalues: np.ndarray) -> dict[str, Any]:
    """Return WeightWatcher's fit, and how it agrees with the ERG condition."""
    names = ("alpha", "ks_distance", "xmin", "xmax", "sigma", "num_tail", "alpha_hat", "log_alpha_norm")
    row: dict[str, Any] = {f"ww_{name}": None for name in names}
    largest = float(eigenvalues[-1])
    if fit := weightwatcher.fit_power_law(eigenvalues):
        relative = eigenvalues[eigenvalues > 0] / largest  # powers of these do not overflow
        row |= {
            "ww_alpha": fit.alpha,
            "ww_ks_distance": fit.ks_distance,
            "ww_xmin": fit.xmin,
            "ww_xmax": largest,
            "ww_sigma": fit.sigma,
            "ww_num_tail": fit.num_tail,
            "ww_alpha_hat": fit.alpha * float(np.log10(largest)),
            "ww_log_alpha_norm": float(np.log10((relative**fit.alpha).sum()) + fit.alpha * np.log10(largest)),
        }
    spikes, least = weightwatcher.erg_tail(eigenvalues) if largest > 0 else (None, None)
    gap = spikes - fit.num_tail if fit and spikes is not None else None
    return row | {"ww_num_erg_spikes": spikes, "ww_detx_val": least, "ww_erg_gap": gap}


def bulk_measures(
    eigenvalues: np.ndarray, shape: tuple[int, ...], live: tuple[int, int], shuffled: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the columns of the bulk of a whole matrix: `BULK`.

    `eigenvalues` is float64 of shape (E,), ascending, not negative, pooled over matrices of `shape`, rows and columns,
    of which `live` are not zero: noise is in these alone. `shuffled`, (B, E), are those of the entries in
    B random orders.
    """
    eigenvalues = resolved(eigenvalues)[-max(eigenvalues.size * min(live) // min(shape), 1) :]
    bulk = marchenko_pastur.fit(eigenvalues, *live) if min(live) else None
    if bulk is None or bulk.sigma == 0:
        return dict.fromkeys(BULK)
    spikes = int((eigenvalues > bulk.threshold).sum())
    inside, longer = eigenvalues[: eigenvalues.size - spikes], max(live)
    law = marchenko_pastur.cdf(inside / longer, min(live) / longer, bulk.sigma)
    steps = (np.arange(inside.size) + 0.5) / inside.size
    distance = max(float(np.abs(law - steps).max() - 0.5 / inside.size), 0.0)
    chance = None if shuffled is None else _by_chance(spikes, eigenvalues, shuffled, shape)
    return dict(zip(BULK, (bulk.sigma, bulk.low, bulk.high, spikes, distance, chance), strict=True))


def _by_chance(spikes: int, eigenvalues: np.ndarray, shuffled: np.ndarray, shape: tuple[int, ...]) -> int:
    """Return how many of a matrix's `spikes` shuffled ones have too: all, where it does not differ from them.

    It does where one of its largest eigenvalues (E,), ascending, is beyond those in its place in shuffled ones (B, E).
    """
    own, others = eigenvalues[::-1][: min(spikes, _LOOKED_AT)], shuffled[:, ::-1][:, : min(spikes, _LOOKED_AT)]
    # Of one shuffle the scatter is not known.
    scatter = _DEVIATIONS * others.std(0) * (1 + 1 / len(others)) ** 0.5
    if not (own > others.mean(0) + np.maximum(_LEAST_STEP * others.mean(0), scatter)).any():
        return spikes
    counts = [(values > marchenko_pastur.fit(values, *shape).threshold).sum() for values in shuffled]
    return min(round(float(np.mean(counts))), spikes - 1)


def shuffled_measures(eigenvalues: np.ndarray, shuffled: np.ndarray, rows: int, cols: int) -> dict[str, Any]:
    """Return `rand_distance` to `rand_num_spikes`, as in WeightWatcher, from one shuffle.

    Both spectra are ascending, of shape (E,), of matrices of `rows` x `cols`. The distance is Jensen and Shannon's
    between the two lists of eigenvalues, each divided by its sum.
    """
    highest = float(shuffled[-1])
    row: dict[str, Any] = dict.fromkeys(("rand_distance", "ww_softrank", "ww_num_spikes", "ww_mp_softrank"))
    row |= {"max_rand_eval": highest, "rand_num_spikes": None}
    if not (highest > 0 and eigenvalues[-1] > 0):
        return row
    p, q = eigenvalues / eigenvalues.sum(), shuffled / shuffled.sum()
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    shorter, longer = sorted((rows, cols))
    own, noise = (weightwatcher.fit_noise(values, longer / shorter, shorter) for values in (eigenvalues, shuffled))
    return row | {
        "rand_distance": float(max(divergence, 0.0)) ** 0.5,
        "ww_softrank": highest / float(eigenvalues[-1]),
        "ww_num_spikes": own.num_spikes,
        "ww_mp_softrank": own.softrank,
        "rand_num_spikes": noise.num_spikes,
    }


def histogram(windows: np.ndarray, whole: np.ndarray | None) -> Histogram:
    """Return the spectra of a layer, in any order, as densities in common bins; flat where all eigenvalues are 0."""
    spectra = [windows] if whole is None else [windows, whole]
    largest = max(float(values.max()) for values in spectra)
    logs = [np.log10(values[values > _DRAWN * largest], dtype=np.float64) for values in spectra]
    filled = [part for part in logs if part.size]  # windows of a sparse layer may all be zero, and it is not
    low, high = (min(map(np.min, filled)), max(map(np.max, filled))) if filled else (-1.0, 1.0)
    if high - low < 1e-3:  # one bin would hold everything
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    densities = []
    for part in logs:
        counts, _ = np.histogram(part, edges)
        densities.append(tuple((counts / (max(counts.sum(), 1) * (edges[1] - edges[0]))).tolist()))
    return Histogram(tuple(edges.tolist()), *densities)


def _log10(value: float) -> float | None:
    return float(np.log10(value)) if value > 0 else None


def _entropy(values: np.ndarray) -> float:
    """Return the entropy of values, as shares of their sum, in nats."""
    shares = values[values > 0] / values.sum()
    return float(-(shares * np.log(shares)).sum())
