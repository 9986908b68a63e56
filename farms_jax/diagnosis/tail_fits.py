"""Tails of many spectra at once, fitted in float64, compiled once for each of few sizes."""

import functools

import jax
import numpy as np
from jax import Array, lax

from farms_jax._tail import Tail, TailFit, fit_tail


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
