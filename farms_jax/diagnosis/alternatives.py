"""How well a power law describes a tail, and what else might: the tests of Clauset, Shalizi and Newman (2009).

The eigenvalues of a matrix repel each other, so that they scatter less than independent draws do: these probabilities
compare layers, but are not levels of a test.

The truncated power law has the density x^-alpha exp(-rate x) from xmin on, alpha in [0, 3], as in the package
`powerlaw` 2.0, to which WeightWatcher hands `fit="TPL"`. Its search for alpha and rate ends within 1e-4 of them; here
they are exact, so that of two thresholds which fit as well the other may be taken.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from farms_jax.diagnosis.weightwatcher import LEAST, PowerLaw, fit_power_law, without_fingers

ALTERNATIVES = ("exponential", "truncated", "lognormal")
_NO_FINGERS = {"ww_clipped_alpha": None, "ww_num_fingers": None}
_HIGHEST = 3.0  # alpha of a truncated power law
_MARGIN = 0.01  # fits so near to the ends of their ranges give no threshold, as in `powerlaw`
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)
_FEW_NODES, _FEW_WEIGHTS = np.polynomial.legendre.leggauss(4)
_NEGLIGIBLE = 45.0  # exp of minus this is nothing
_LEAST_RATE = 1e-10  # in units of 1 / xmin
_MOST_STEPS = 200


class Ratio(NamedTuple):
    """Log-likelihood of a power law less that of an alternative, and how likely such a size is if both are as good."""

    ratio: float
    probability: float


class Truncated(NamedTuple):
    """A truncated power law fitted to the tail of a spectrum."""

    alpha: float
    rate: float  # in 1 / eigenvalue
    ks_distance: float
    xmin: float


def tail_measures(
    eigenvalues: np.ndarray, *, alternatives: bool, samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the columns `gof_p`, with `samples`, and `ww_clipped_alpha` to `lognormal_p`, with `alternatives`.

    `eigenvalues` is float64 of shape (E,), ascending, not negative.
    """
    fit = fit_power_law(eigenvalues)
    row: dict[str, Any] = {}
    if samples:
        row["gof_p"] = goodness_of_fit(eigenvalues, fit, samples, rng) if fit else None
    if alternatives:
        clipped = without_fingers(eigenvalues, fit) if fit else None
        row |= {"ww_clipped_alpha": clipped[0].alpha, "ww_num_fingers": clipped[1]} if clipped else _NO_FINGERS
        truncated = fit_truncated(eigenvalues) or (None,) * len(Truncated._fields)
        row |= dict(zip(("tpl_alpha", "tpl_lambda", "tpl_ks_distance", "tpl_xmin"), truncated, strict=True))
        compared = compare_alternatives(eigenvalues, fit) if fit else dict.fromkeys(ALTERNATIVES, (None, None))
        for name, (ratio, probability) in compared.items():
            row |= {f"{name}_ratio": ratio, f"{name}_p": probability}
    return row


def goodness_of_fit(eigenvalues: np.ndarray, fit: PowerLaw, samples: int, rng: np.random.Generator) -> float:
    """Return how often spectra of this power law, each with its own fit, are as far from theirs as this one or further.

    Eigenvalues below the threshold are drawn from those that there are, the others from the power law. Of so many
    `samples` the error is about 1 / (2 sqrt(samples)). Below 0.1, Clauset et al. reject the power law.
    """
    kept = eigenvalues[eigenvalues > LEAST]
    body = kept[kept < fit.xmin]
    worse = 0
    for _ in range(samples):
        count = rng.binomial(kept.size, fit.num_tail / kept.size) if body.size else kept.size
        tail = fit.xmin * rng.uniform(size=count) ** (-1 / (fit.alpha - 1))
        drawn = np.sort(np.concatenate([rng.choice(body, kept.size - count) if body.size else body, tail]))
        found = fit_power_law(drawn)
        worse += found is None or found.ks_distance >= fit.ks_distance
    return worse / samples


def compare_alternatives(eigenvalues: np.ndarray, fit: PowerLaw) -> dict[str, Ratio]:
    """Return the ratios to the laws of `ALTERNATIVES`, fitted to the same tail.

    The test is Vuong's; of the truncated power law, of which the power law is a case, the likelihood-ratio test.
    """
    tail = eigenvalues[eigenvalues >= fit.xmin] / fit.xmin
    logs = np.log(tail)
    power = np.log(fit.alpha - 1) - fit.alpha * logs
    rate = 1 / (tail.mean() - 1)
    alpha, cut = (float(part[0]) for part in _maximum(logs.mean()[None], tail.mean()[None]))
    truncated = -alpha * logs - cut * tail - _log_integral(np.array([alpha]), np.array([cut]))[0]
    found = (
        _vuong(power, np.log(rate) - rate * (tail - 1)),
        _vuong(power, truncated, nested=True),
        _vuong(power, _lognormal(logs)),
    )
    return dict(zip(ALTERNATIVES, found, strict=True))


def _vuong(first: np.ndarray, second: np.ndarray, *, nested: bool = False) -> Ratio:
    differences = first - second
    ratio = float(differences.sum())
    if nested:
        return Ratio(ratio, float(special.chdtrc(1, abs(2 * ratio))))
    scatter = float(differences.std()) * (2 * differences.size) ** 0.5
    return Ratio(ratio, float(special.erfc(abs(ratio) / scatter)) if scatter > 0 else 1.0)


def _lognormal(logs: np.ndarray) -> np.ndarray:
    """Return the log-likelihoods of the lognormal law, cut off below 1, that fits best; of the logarithms of a tail."""

    def likelihoods(parameters: np.ndarray) -> np.ndarray:
        mean, deviation = parameters
        if not deviation > 0:
            return np.full(logs.size, -1e3)
        norm = np.log(deviation * (2 * np.pi) ** 0.5) + special.log_ndtr(mean / deviation)
        return -logs - ((logs - mean) / deviation) ** 2 / 2 - norm

    start, bounds = (logs.mean(), logs.std()), ((None, None), (0, None))
    # Where the power law is better, the best mean is at minus infinity, and the ratio 0 but for the search's tolerance;
    # the densities that `powerlaw` takes there nearly vanish in float64, and its ratio is one of rounding.
    best = optimize.minimize(
        lambda parameters: -likelihoods(parameters).sum(), start, bounds=bounds, method="Nelder-Mead", tol=1e-4
    )
    return likelihoods(best.x)


def fit_truncated(eigenvalues: np.ndarray) -> Truncated | None:
    """Return the truncated power law from the threshold of the smallest KS distance on; `None` without a tail.

    As in `powerlaw`, a rate below 0.01 or an alpha near 0 or 3 gives no threshold, unless all do.
    """
    kept = np.unique(eigenvalues[eigenvalues > LEAST])
    if kept.size < 4:
        return None
    logs, count = np.log(kept), kept.size - np.arange(kept.size)
    means = np.cumsum(logs[::-1])[::-1] / count - logs, np.cumsum(kept[::-1])[::-1] / count / kept
    alphas, rates = _maximum(*(part[:-2] for part in means))
    rates /= kept[:-2]
    distances = _distances(kept, alphas, rates)
    sound = (alphas > _MARGIN) & (alphas < _HIGHEST - _MARGIN) & (rates > _MARGIN)
    best = int(np.where(sound, distances, distances + sound.any()).argmin())
    return Truncated(*(float(part[best]) for part in (alphas, rates, distances, kept)))


def _maximum(mean_log: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return alphas and rates of greatest likelihood for tails from 1 on, with these means of ln x and x, shape (T,).

    Newton's method: the likelihood is concave, and its derivatives are means and covariances of (ln x, x).
    """
    alpha, rate = np.clip(1 + 1 / mean_log, 0, _HIGHEST), 1 / mean
    step = np.ones_like(alpha)
    loss = alpha * mean_log + rate * mean + _log_integral(alpha, rate)
    for _ in range(_MOST_STEPS):
        along, change = _newton(alpha, rate, mean_log, mean)
        next_alpha = np.clip(alpha + step * along, 0, _HIGHEST)
        next_rate = np.clip(rate + step * change, np.maximum(rate / 10, _LEAST_RATE), 10 * rate)
        found = next_alpha * mean_log + next_rate * mean + _log_integral(next_alpha, next_rate)
        better = found <= loss
        moved = np.abs(next_alpha - alpha) + np.abs(np.log(next_rate / rate))
        pairs = (next_alpha, alpha), (next_rate, rate), (found, loss)
        alpha, rate, loss = (np.where(better, *pair) for pair in pairs)
        step = np.where(better, np.minimum(2 * step, 1), step / 4)
        if (moved < 1e-9).all():
            break
    return alpha, rate


def _newton(
    alpha: np.ndarray, rate: np.ndarray, mean_log: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps of alpha and rate; where one is at its end, or far from where it goes, those of the other alone."""
    (log_now, now), (var_log, both, var) = _moments(alpha, rate)
    slope, tilt = log_now - mean_log, now - mean  # of the likelihood
    determinant = np.maximum(var_log * var - both**2, 1e-300)
    along, change = (var * slope - both * tilt) / determinant, (var_log * tilt - both * slope) / determinant
    at_end = ((alpha >= _HIGHEST) & (slope > 0)) | ((alpha <= 0) & (slope < 0))
    along, change = np.where(at_end, 0, along), np.where(at_end, tilt / var, change)
    return np.where((change < -0.9 * rate) & ~at_end, slope / var_log, along), change


def _integrand(alpha: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes u = ln x (T, 100) and their weights times x^(1 - alpha) exp(rate (1 - x)), from x = 1 to its end."""
    end = np.log1p(_NEGLIGIBLE / rate)[:, None]
    nodes = end * (_NODES + 1) / 2
    exponents = (1 - alpha)[:, None] * nodes - rate[:, None] * np.expm1(nodes)
    return nodes, np.exp(exponents) * _WEIGHTS * end / 2


def _log_integral(alpha: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Return ln of the integral of x^-alpha exp(-rate x) from 1 on."""
    return np.log(_integrand(alpha, rate)[1].sum(1)) - rate


def _moments(alpha: np.ndarray, rate: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return the means of ln x and x under the law from 1 on; and the variances, with the covariance between them."""
    nodes, weights = _integrand(alpha, rate)
    weights = weights / weights.sum(1, keepdims=True)
    values = np.exp(nodes)
    means = (weights * nodes).sum(1), (weights * values).sum(1)
    off, far = nodes - means[0][:, None], values - means[1][:, None]
    return means, tuple((weights * one * other).sum(1) for one, other in ((off, off), (off, far), (far, far)))


def _distances(kept: np.ndarray, alphas: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Return the KS distances of truncated power laws, the i-th from the i-th of ascending eigenvalues on."""
    logs = np.log(kept)
    # The integral from one eigenvalue to the next, over pieces of a common grid that are short enough.
    edges = np.unique(np.concatenate([logs, np.linspace(logs[0], logs[-1], 200)]))
    ends, half = np.searchsorted(edges, logs), np.diff(edges)[:, None] / 2
    nodes, weights = edges[:-1, None] + half * (_FEW_NODES + 1), half * _FEW_WEIGHTS
    values = np.exp(nodes)
    distances = np.ones(alphas.size)
    for i, (alpha, rate) in enumerate(zip(alphas, rates, strict=True)):
        start = ends[i]
        exponents = (1 - alpha) * (nodes[start:] - logs[i]) - rate * (values[start:] - kept[i])
        pieces = (weights[start:] * np.exp(exponents)).sum(1)
        above = _log_integral(np.array([alpha]), np.array([rate * kept[-1]]))[0] + (1 - alpha) * (logs[-1] - logs[i])
        rest = np.exp(above + rate * kept[i])
        beyond = np.append(np.cumsum(pieces[::-1])[::-1], 0) + rest
        count = kept.size - i
        reached = 1 - beyond[ends[i:] - start] / beyond[0]
        distances[i] = np.abs(reached - np.arange(count) / count).max()
    return distances
