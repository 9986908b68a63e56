"""What WeightWatcher 0.7.7 says of a spectrum, number for number: its power law, its ERG condition, its bulk of noise.

Its rules are absolute in the scale of the weights: eigenvalues up to 1e-5 are left out of a fit, so a layer of tiny
weights has none. They are followed here as they are, for numbers that compare; the columns of FARMS hold at any scale.

References:
    https://github.com/CalculatedContent/WeightWatcher, version 0.7.7: `WeightWatcher.analyze` with `detX`, `mp_fit`,
    `randomize` and `fix_fingers="clip_xmax"`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize

from farms_jax._tail import Tail
from farms_jax.diagnosis.tail_fits import fit_spectra

LEAST = 1e-5  # eigenvalues up to it are left out of fits
_KS = Tail("ks")
_FEW = 20  # a fit to fewer eigenvalues is corrected for the bias of small samples
_LEAST_TAIL = 8  # of eigenvalues, in such a fit
_MOST_FINGERS = 10
_FINGER = 1.0  # by so much alpha must fall for eigenvalues to be fingers
_GRID = 1000  # eigenvalues at which the density of a spectrum is compared with that of noise
_BANDWIDTH = 0.1
_EMPTY = 0.01  # density below which the comparison leaves a place out


class PowerLaw(NamedTuple):
    """A power law fitted to the tail of a spectrum: its exponent, KS distance, threshold and number of eigenvalues."""

    alpha: float
    ks_distance: float
    xmin: float
    num_tail: int

    @property
    def sigma(self) -> float:
        """Standard error of alpha."""
        return (self.alpha - 1) / self.num_tail**0.5


class Noise(NamedTuple):
    """A Marchenko-Pastur law fitted to a spectrum: eigenvalues beyond it, and its upper edge over the largest one."""

    num_spikes: int
    softrank: float


def fit_power_law(eigenvalues: np.ndarray) -> PowerLaw | None:
    """Return the power law from the threshold of the smallest KS distance on; `None` where there is no tail to fit.

    `eigenvalues` is float64 of shape (E,), ascending, not negative.
    """
    kept = eigenvalues[eigenvalues > LEAST]
    if kept.size < 2:
        return None
    if kept.size < _FEW:
        return _fit_few(kept)
    alpha, distance, xmin = (float(part[0]) for part in fit_spectra(kept[None], _KS)[:3])
    return PowerLaw(alpha, distance, xmin, int((kept >= xmin).sum())) if alpha > 0 else None


def _fit_few(kept: np.ndarray) -> PowerLaw | None:
    """Return the fit to less than 20 eigenvalues: n - 1 in place of n, and tails of 8 or more, or of all."""
    logs = np.log(kept)
    best = None
    for start in range(max(kept.size - _LEAST_TAIL + 1, 1)):
        count = kept.size - start
        spread = float((logs[start:] - logs[start]).sum())
        if spread <= 1e-12:
            continue
        alpha = 1 + (count - 1) / spread
        expected = 1 - (kept[start:] / kept[start]) ** (1 - alpha)
        distance = float(np.abs(np.arange(count) / count - expected).max())
        if best is None or distance < best.ks_distance:
            best = PowerLaw(alpha, distance, float(kept[start]), int((kept >= kept[start]).sum()))
    return best


def without_fingers(eigenvalues: np.ndarray, raw: PowerLaw) -> tuple[PowerLaw, int] | None:
    """Return the power law without fingers, and their number; `None` where too few eigenvalues remain for a fit.

    Fingers are a few largest eigenvalues without which alpha falls by more than 1; `raw` is the fit with them.
    """
    kept = eigenvalues[eigenvalues > LEAST]
    for cut in range(2, _MOST_FINGERS):
        fit = fit_power_law(kept[:-cut])
        if fit is None:
            return None
        if fit.alpha + _FINGER < raw.alpha:
            return fit, cut - 1
        if fit.alpha <= 2:
            break
    return raw, 0


def erg_tail(eigenvalues: np.ndarray) -> tuple[int, float]:
    """Return the number and the least of the largest eigenvalues whose product is 1, in units of their mean.

    This is WeightWatcher's detX or ERG condition: the smallest number of eigenvalues whose product is below 1. Its
    product is one of float64, which vanishes where those below the mean come to less than 1e-323, in spectra of some
    thousand eigenvalues; the tail then ends there, and so it does here.
    """
    if eigenvalues.size < 2 or not eigenvalues[0] < eigenvalues[-1]:
        return 0, float(eigenvalues[0])
    relative = eigenvalues / eigenvalues.mean()
    # The product grows down to the mean and then only falls: a bisection finds where it passes 1.
    above = int(np.searchsorted(relative, 1.0))
    low, high = 0, above
    with np.errstate(over="ignore", under="ignore"):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if np.prod(relative[middle:]) < 1 else (low, middle)
    if low == 0:  # no product is below 1
        return eigenvalues.size, float(eigenvalues[1])
    return eigenvalues.size - low, float(eigenvalues[low])


def fit_noise(eigenvalues: np.ndarray, aspect_ratio: float, shorter: int) -> Noise:
    """Return the Marchenko-Pastur law whose density is nearest to that of a spectrum.

    Args:
        eigenvalues: float64 of shape (E,), ascending, the last above 0.
        aspect_ratio: longer over shorter axis of the matrix, at least 1.
        shorter: length of the shorter axis.
    """
    relative = eigenvalues / eigenvalues.mean()
    root = aspect_ratio**-0.5
    values = np.sqrt(relative) if aspect_ratio == 1 else relative
    places, density = _density(values)
    widest = relative[-1] ** 0.5 / (1 + root)  # the law whose edge is the largest eigenvalue
    sigma = _nearest(places, density, aspect_ratio, widest)
    high = (sigma * (1 + root)) ** 2
    beyond = high + (root * high ** (2 / 3) * shorter ** (-2 / 3)) ** 0.5
    return Noise(int((relative > beyond).sum()), float(high / relative[-1]))


def _density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the density of ascending values is not nearly 0, and that density, by a triangular kernel."""
    places = np.linspace(0, values[-1] + 0.5, _GRID)
    sums = np.concatenate([[0.0], np.cumsum(values)])

    def triangle_half(low: np.ndarray, high: np.ndarray, sign: int) -> np.ndarray:
        # The sum of 1 - sign (value - place) / bandwidth over the values from `low` to `high`.
        first, last = np.searchsorted(values, low, "left"), np.searchsorted(values, high, "left")
        count, total = last - first, sums[last] - sums[first]
        return count - sign * (total - count * places) / _BANDWIDTH

    kernel = triangle_half(places - _BANDWIDTH, places, -1) + triangle_half(places, places + _BANDWIDTH, 1)
    density = kernel / (values.size * _BANDWIDTH)
    kept = density > _EMPTY
    return places[kept], density[kept]


def _nearest(places: np.ndarray, density: np.ndarray, aspect_ratio: float, widest: float) -> float:
    """Return the deviation of the law nearest to a density in the mean square, from a grid, then a simplex."""
    misfit = _quarter_circle(places, density) if aspect_ratio == 1 else _misfit(places, density, aspect_ratio)
    grid = widest * (0.05 + 0.01 * np.arange(195))
    start = grid[np.argmin([misfit(sigma) for sigma in grid])]
    return float(optimize.fmin(lambda sigma: misfit(sigma[0]), start, disp=False)[0])


def _quarter_circle(places: np.ndarray, density: np.ndarray) -> Callable[[float], float]:
    """Return the misfit of a deviation, by the law of singular values, of radius 2 whatever the deviation is."""
    law = np.sqrt(np.maximum(4 - places**2, 0)) / np.pi
    squares, products, rest = law @ law, law @ density, density @ density
    return lambda sigma: float(squares / sigma**4 - 2 * products / sigma**2 + rest)


def _misfit(places: np.ndarray, density: np.ndarray, aspect_ratio: float) -> Callable[[float], float]:
    """Return the misfit of a deviation; it is huge where the peak is outside the law, or the law outside the places."""
    root, peak, last = aspect_ratio**-0.5, places[density.argmax()], places[-1]
    divisors = 2 * np.pi / aspect_ratio * np.where(places > 0, places, 1)

    def misfit(sigma: float) -> float:
        low, high = (sigma * (1 - root)) ** 2, (sigma * (1 + root)) ** 2
        if high < peak or high > last or low > peak:
            return 1e6 * density.size
        off = np.sqrt(np.maximum((high - places) * (places - low), 0)) / (sigma**2 * divisors) - density
        return float(off @ off)

    return misfit
