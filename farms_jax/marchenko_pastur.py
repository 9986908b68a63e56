r"""The Marchenko-Pastur law: eigenvalues of W W^T / N for a matrix of noise, what FARMS and its baseline see in it.

W has M rows and N >= M columns of independent entries of mean 0 and deviation `sigma`; `ratio` is M / N, in (0, 1].
For large W the eigenvalues then have the density

    sqrt((high - x) (x - low)) / (2 pi sigma^2 ratio x),    low, high = sigma^2 (1 -+ sqrt(ratio))^2

Everything below is computed in the angle t in [0, pi] with x = low + 4 sigma^2 sqrt(ratio) sin^2(t / 2): in it the law
is smooth up to both edges, also where the lower one is 0.

References:
    Marchenko and Pastur, Distribution of eigenvalues for some sets of random matrices, 1967.
    Hu et al., Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias, ICML 2025, section 3.2.
"""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaincinv

_NODES = 60  # of the quadrature; the integrand is smooth, and 40 give 12 digits
_HALVINGS = 60  # of [0, pi], down to the last bits of float64
_TRACY_WIDOM = (46.446, 0.186054, 9.84801)  # of real matrices: shape, scale and shift of the gamma law next to it
_MEDIAN_ERROR = 3.0  # what that of sigma, which the median gives, adds to the threshold; measured for 16 to 256 rows


class Bulk(NamedTuple):
    """The part of a spectrum that noise alone would have, in the scale of the eigenvalues of W W^T.

    Attributes:
        sigma: deviation of an entry of that noise.
        low: lower edge.
        high: upper edge.
        threshold: the largest eigenvalue of the noise alone, of all its matrices, is below this in 99 of 100 cases.
    """

    sigma: float
    low: float
    high: float
    threshold: float


def edges(ratio: float, sigma: float = 1.0) -> tuple[float, float]:
    """Return the ends of the law's support.

    >>> edges(0.25)
    (0.25, 2.25)

    Args:
        ratio: M / N, in (0, 1].
        sigma: deviation of an entry.

    Returns:
        Lower and upper edge.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(ratio, sigma)
    root = ratio**0.5
    return sigma**2 * (1 - root) ** 2, sigma**2 * (1 + root) ** 2


def density(x: ArrayLike, ratio: float, sigma: float = 1.0) -> np.ndarray:
    """Return the density of the eigenvalues of W W^T / N.

    >>> density([0.1, 1.0, 3.0], 0.25).round(3).tolist()
    [0.0, 0.616, 0.0]

    Args:
        x: eigenvalues, any shape.
        ratio: M / N, in (0, 1].
        sigma: deviation of an entry.

    Returns:
        The density, shape of `x`; 0 outside the edges, and at an edge at 0, where it has no bound.

    Raises:
        ValueError: an argument is out of its range.
    """
    low, high = edges(ratio, sigma)
    x = np.asarray(x, np.float64)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, (low + high) / 2)
    return np.where(inside, np.sqrt((high - safe) * (safe - low)) / (2 * np.pi * sigma**2 * ratio * safe), 0)


def cdf(x: ArrayLike, ratio: float, sigma: float = 1.0) -> np.ndarray:
    """Return the share of the eigenvalues of W W^T / N up to x.

    >>> cdf([0.25, 0.5, 1.0, 2.25], 0.25).round(3).tolist()
    [0.0, 0.186, 0.553, 1.0]

    Args:
        x: eigenvalues, any shape.
        ratio: M / N, in (0, 1].
        sigma: deviation of an entry.

    Returns:
        The share, in [0, 1], shape of `x`.

    Raises:
        ValueError: an argument is out of its range.
    """
    low, high = edges(ratio, sigma)
    place = np.clip((np.asarray(x, np.float64) - low) / (high - low), 0, 1)
    return _share(2 * np.arcsin(np.sqrt(place)), ratio)


def quantile(p: ArrayLike, ratio: float, sigma: float = 1.0) -> np.ndarray:
    """Return the eigenvalue of W W^T / N below which a share p lies.

    >>> quantile([0.0, 0.5, 1.0], 0.25).round(3).tolist()
    [0.25, 0.916, 2.25]

    Args:
        p: share, in [0, 1], any shape.
        ratio: M / N, in (0, 1].
        sigma: deviation of an entry.

    Returns:
        The eigenvalues, shape of `p`.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(ratio, sigma)
    return sigma**2 * _eigenvalue(_angle(p, ratio), ratio)


@functools.cache  # few shapes differ among a network's layers
def hill_alpha(ratio: float, xmin_pos: float = 2.0) -> float:
    """Return alpha of the median rule on the law itself: 1 + 1 / E[ln(x / xmin) | x >= xmin], whatever sigma.

    This is what `farms_jax.analyze` finds in large matrices of noise. It depends on their aspect ratio: over FARMS's
    windows it is one number for every layer, over whole matrices another for each shape.

    >>> round(hill_alpha(1.0), 3), round(hill_alpha(0.1), 3)
    (2.122, 4.873)

    Args:
        ratio: M / N, in (0, 1].
        xmin_pos: position of the rule, above 1, as `Tail.xmin_pos`.

    Returns:
        Alpha, above 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(ratio, 1.0)
    if not xmin_pos > 1:
        raise ValueError(f"hill_alpha: xmin_pos must be above 1, got {xmin_pos}")
    first = float(_angle(1 / xmin_pos, ratio))
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    angle = first + (np.pi - first) * (nodes + 1) / 2
    x = _eigenvalue(angle, ratio)
    mass = weights * np.sin(angle) ** 2 / x  # the law's density times dx / d(angle), up to a factor
    return float(1 + mass.sum() / (mass @ np.log(x / _eigenvalue(np.asarray(first), ratio))))


def fit(eigenvalues: ArrayLike, rows: int, cols: int) -> Bulk:
    """Fit the law to the bulk of a spectrum, by its median: few large eigenvalues do not move it.

    >>> noise = 0.1 * np.random.default_rng(0).standard_normal((200, 400))
    >>> bulk = fit(np.linalg.svd(noise, compute_uv=False) ** 2, 200, 400)
    >>> round(bulk.sigma, 2), round(bulk.high, 1), round(bulk.threshold, 1)
    (0.1, 11.8, 12.2)

    Args:
        eigenvalues: eigenvalues of W W^T, not divided by a dimension, in any order; several matrices of one shape may
            be pooled.
        rows: rows of one matrix.
        cols: columns of one matrix.

    Returns:
        The bulk; all zero where half the eigenvalues are.

    Raises:
        ValueError: there is no eigenvalue, or no row or column.

    References:
        The median: Gavish and Donoho, The optimal hard threshold for singular values is 4/sqrt(3), 2014. The threshold:
        Johnstone, On the distribution of the largest eigenvalue in principal components analysis, 2001. Its law:
        Chiani, Distribution of the largest eigenvalue for real Wishart and Gaussian random matrices, 2014.
    """
    values = np.asarray(eigenvalues, np.float64)
    if values.size == 0 or min(rows, cols) < 1:
        raise ValueError(f"fit: needs eigenvalues, rows and columns, got {values.size}, {rows} and {cols}")
    shorter, longer = sorted((rows, cols))
    ratio = shorter / longer
    sigma = float(np.median(values) / (longer * _median(ratio))) ** 0.5
    low, high = (longer * sigma**2 * edge for edge in edges(ratio))
    root = (longer - 1) ** 0.5 if longer > 1 else 1.0  # Johnstone's N - 1, which is 0 for a single entry
    spread = (root + shorter**0.5) * (1 / root + shorter**-0.5) ** (1 / 3)
    beyond = _largest_of(max(values.size // shorter, 1))
    threshold = sigma**2 * ((root + shorter**0.5) ** 2 + beyond * spread)
    threshold *= 1 + _MEDIAN_ERROR * ratio / values.size
    return Bulk(sigma, low, high, max(high, threshold))


def _largest_of(matrices: int) -> float:
    """Return the 99 % quantile of the largest of so many draws of the Tracy-Widom law."""
    shape, scale, shift = _TRACY_WIDOM
    return float(gammaincinv(shape, 0.99 ** (1 / matrices)) * scale - shift)


@functools.cache  # half a millisecond each time, and few shapes differ among a network's layers
def _median(ratio: float) -> float:
    return float(quantile(0.5, ratio))


def _check(ratio: float, sigma: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"marchenko_pastur: ratio must be in (0, 1], the shorter axis over the longer; got {ratio}")
    if not sigma > 0:
        raise ValueError(f"marchenko_pastur: sigma must be above 0, got {sigma}")


def _eigenvalue(angle: np.ndarray, ratio: float) -> np.ndarray:
    root = ratio**0.5
    return (1 - root) ** 2 + 4 * root * np.sin(angle / 2) ** 2


def _share(angle: np.ndarray, ratio: float) -> np.ndarray:
    """Return the law's integral up to an angle, in closed form."""
    root = ratio**0.5
    turned = 2 * np.arctan2((1 + root) * np.sin(angle / 2), (1 - root) * np.cos(angle / 2))
    share = (2 * root * np.sin(angle) + (1 + ratio) * angle - (1 - ratio) * turned) / (2 * np.pi * ratio)
    return np.clip(share, 0, 1)


def _angle(p: ArrayLike, ratio: float) -> np.ndarray:
    """Return the angle up to which a share p lies, by halving."""
    p = np.asarray(p, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("marchenko_pastur: p must be in [0, 1]")
    low, high = np.zeros_like(p), np.full_like(p, np.pi)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _share(middle, ratio) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p == 0, 0, np.where(p == 1, np.pi, high))  # at the ends rounding decides where the share is reached
