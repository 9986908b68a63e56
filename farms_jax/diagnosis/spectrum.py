"""Spectra -> numbers: what one layer's eigenvalues say, in float64, whichever solver found them.

Eigenvalues are those of W W^T, ascending, pooled over kernel positions and scaled as the reference and WeightWatcher do
it. Numbers that do not exist for a spectrum, such as the logarithm of a norm of 0, are `None`.

The columns that WeightWatcher has too (`Column.weightwatcher`) equal those of its version 0.7.7, but for these:
`sv_min` and `rank_loss` of a kernel are of all positions together, where WeightWatcher takes the largest of the
positions' `sv_min` and a threshold for each position; a spectrum with fewer than 20 eigenvalues above 1e-5 is fitted as
any other, where WeightWatcher corrects for the bias of small samples; `entropy` has no 1e-10 added to its shares.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax

from farms_jax import marchenko_pastur
from farms_jax._tail import Tail, TailFit, fit_tail

WEIGHTWATCHER = Tail("ks", min_eigenvalue=1e-5)
_WEAK = 1e-6  # eigenvalues below it count as a weak loss of rank, as in WeightWatcher
_BINS = 60
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


def fit_spectra(spectra: np.ndarray, tail: Tail) -> TailFit:
    """Return fits in float64, NumPy arrays (S,), to the tails of spectra (S, E), each row ascending, not negative."""
    count, length = spectra.shape
    # From 80 on: 4 x 80 and so on hold what widths of 2^n give, over 9 kernel positions too, with little to spare.
    padded = np.zeros((_padded(count, 1, 16), _padded(length, 80, 4)))
    padded[:count, padded.shape[1] - length :] = spectra
    with jax.enable_x64(True):
        return TailFit(*(part[:count] for part in jax.device_get(_fit(padded, length, tail))))


def _padded(size: int, least: int, factor: int) -> int:
    """Return the smallest of few sizes that holds `size`: the fit is compiled once for each."""
    while least < size:
        least *= factor
    return least


@functools.partial(jax.jit, static_argnames="tail")
def _fit(padded: Array, length: Array, tail: Tail) -> TailFit:
    return lax.map(lambda spectrum: fit_tail(spectrum, tail, length), padded)


def resolved(eigenvalues: np.ndarray) -> np.ndarray:
    """Return ascending eigenvalues (E,), as `analyze` has them: 0 below the resolution of a Gram matrix in float64."""
    floor = eigenvalues[-1] * eigenvalues.size * np.finfo(np.float64).eps
    return np.where(eigenvalues > floor, eigenvalues, 0)


def spectrum_measures(eigenvalues: np.ndarray, rows: int, cols: int) -> dict[str, Any]:
    """Return the columns of a whole matrix: `ww_alpha` to `sv_min`, `mp_sigma` to `mp_spikes`.

    `eigenvalues` is float64 of shape (E,), ascending, not negative, pooled over a kernel's matrices of `rows` x `cols`.
    """
    norm, largest = float(eigenvalues.sum()), float(eigenvalues[-1])
    singular = np.sqrt(eigenvalues)
    rank = int((singular > singular[-1] * max(rows, cols) * np.finfo(np.float64).eps).sum())
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
        "rank_loss": eigenvalues.size - rank,
        "weak_rank_loss": int((eigenvalues < _WEAK).sum()),
        "sv_max": float(singular[-1]),
        "sv_min": float(singular[0]),
        **_bulk(resolved(eigenvalues), rows, cols),
    }


def _power_law(eigenvalues: np.ndarray) -> dict[str, Any]:
    """Return WeightWatcher's fit: among all eigenvalues above 1e-5, the threshold with the smallest KS distance."""
    fit = fit_spectra(eigenvalues[None], WEIGHTWATCHER)
    alpha, distance, xmin = (float(part[0]) for part in fit[:3])
    if alpha == 0:
        names = ("alpha", "ks_distance", "xmin", "xmax", "sigma", "num_tail", "alpha_hat", "log_alpha_norm")
        return {f"ww_{name}": None for name in names}
    largest = float(eigenvalues[-1])
    spikes = int((eigenvalues >= xmin).sum())
    relative = eigenvalues[eigenvalues > 0] / largest  # powers of these do not overflow
    return {
        "ww_alpha": alpha,
        "ww_ks_distance": distance,
        "ww_xmin": xmin,
        "ww_xmax": largest,
        "ww_sigma": (alpha - 1) / spikes**0.5,
        "ww_num_tail": spikes,
        "ww_alpha_hat": alpha * float(np.log10(largest)),
        "ww_log_alpha_norm": float(np.log10((relative**alpha).sum()) + alpha * np.log10(largest)),
    }


def _bulk(eigenvalues: np.ndarray, rows: int, cols: int) -> dict[str, Any]:
    bulk = marchenko_pastur.fit(eigenvalues, rows, cols)
    if bulk.sigma == 0:
        return dict.fromkeys(("mp_sigma", "mp_min", "mp_max", "mp_spikes"))
    spikes = int((eigenvalues > bulk.threshold).sum())
    return {"mp_sigma": bulk.sigma, "mp_min": bulk.low, "mp_max": bulk.high, "mp_spikes": spikes}


def shuffled_measures(eigenvalues: np.ndarray, shuffled: np.ndarray) -> dict[str, Any]:
    """Return `rand_distance`, `max_rand_eval` and `ww_softrank`, as in WeightWatcher, from one shuffle.

    Both spectra are ascending, of shape (E,). The distance is Jensen and Shannon's between the two lists of
    eigenvalues, each divided by its sum.
    """
    highest = float(shuffled[-1])
    if not (highest > 0 and eigenvalues[-1] > 0):
        return {"rand_distance": None, "max_rand_eval": highest, "ww_softrank": None}
    p, q = eigenvalues / eigenvalues.sum(), shuffled / shuffled.sum()
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return {
        "rand_distance": float(max(divergence, 0.0)) ** 0.5,
        "max_rand_eval": highest,
        "ww_softrank": highest / float(eigenvalues[-1]),
    }


def histogram(windows: np.ndarray, whole: np.ndarray | None) -> Histogram:
    """Return the spectra of a layer, in any order, as densities in common bins; flat where all eigenvalues are 0."""
    spectra = [windows] if whole is None else [windows, whole]
    largest = max(float(values.max()) for values in spectra)
    logs = [np.log10(values[values > _DRAWN * largest], dtype=np.float64) for values in spectra]
    low, high = (-1.0, 1.0) if largest == 0 else (min(part.min() for part in logs), max(part.max() for part in logs))
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
