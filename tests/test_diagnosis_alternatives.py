"""Other laws for a tail: against draws whose law is known, and against plain integrals."""

import numpy as np
import pytest
from helpers import power_law
from scipy.integrate import quad

from farms_jax.diagnosis.alternatives import compare_alternatives, fit_truncated, goodness_of_fit, tail_measures
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.weightwatcher import fit_power_law

RNG = np.random.default_rng(0)
DRAWS = {
    "power law": power_law(2.5, 300),
    "exponential": np.sort(1 + RNG.exponential(size=300)),
    "lognormal": np.sort(np.exp(0.5 * RNG.standard_normal(300))),
}


def from_one_on(name):
    """A fit to all eigenvalues, whatever their law."""
    values = DRAWS[name]
    alpha = 1 + values.size / np.log(values / values[0]).sum()
    return fit_power_law(values)._replace(alpha=alpha, xmin=values[0], num_tail=values.size)


def test_each_law_is_found_among_the_others():
    ratios = {name: compare_alternatives(values, from_one_on(name)) for name, values in DRAWS.items()}
    assert ratios["power law"]["exponential"].ratio > 50
    assert ratios["power law"]["truncated"].probability > 0.1
    assert abs(ratios["power law"]["lognormal"].ratio) < 1
    for name in ("exponential", "lognormal"):
        assert ratios[name][name].ratio < min(-20, min(found.ratio for found in ratios[name].values()) + 1)
        assert ratios[name][name].probability < 1e-3


def test_a_power_law_is_no_worse_than_its_samples():
    rng = np.random.default_rng(0)
    shares = {name: goodness_of_fit(values, from_one_on(name), 20, rng) for name, values in DRAWS.items()}
    assert shares["power law"] > 0.1
    far = fit_power_law(DRAWS["exponential"])._replace(ks_distance=0.4)
    assert goodness_of_fit(DRAWS["exponential"], far, 20, rng) == 0
    assert goodness_of_fit(DRAWS["exponential"], far._replace(ks_distance=0.0), 20, rng) == 1


@pytest.mark.parametrize(("alpha", "rate"), [(1.5, 0.3), (0.5, 0.05), (2.5, 0.02)])
def test_a_cutoff_is_found(alpha, rate):
    rng = np.random.default_rng(1)
    drawn = 1 + rng.exponential(1 / rate, 200_000)
    kept = np.sort(drawn[rng.uniform(size=drawn.size) < drawn**-alpha][:1500])
    found = fit_truncated(kept)
    total, _ = quad(lambda x: x**-found.alpha * np.exp(-found.rate * (x - found.xmin)), found.xmin, np.inf)
    assert found.xmin < 3
    np.testing.assert_allclose((found.alpha, found.rate), (alpha, rate), rtol=0.35)
    tail = kept[kept >= found.xmin]

    def mean(function):
        density = lambda x: function(x) * x**-found.alpha * np.exp(-found.rate * (x - found.xmin)) / total  # noqa: E731
        return quad(density, found.xmin, np.inf)[0]

    # At the maximum of the likelihood the law's means of x and ln x are the tail's.
    np.testing.assert_allclose((mean(np.log), mean(lambda x: x)), (np.log(tail).mean(), tail.mean()), rtol=1e-6)
    reached = [1 - mean(lambda x, end=end: x >= end) for end in tail[:: tail.size // 5]]
    steps = np.arange(tail.size)[:: tail.size // 5] / tail.size
    assert np.abs(reached - steps).max() <= found.ks_distance + 1e-3


def test_spectra_without_a_tail_have_no_numbers():
    for values in (np.zeros(30), np.ones(30), np.array([0.0, 2.0])):
        row = tail_measures(values, alternatives=True, samples=2, rng=np.random.default_rng(0))
        assert set(row.values()) <= {None, 0}
    with pytest.raises(ValueError, match="whole"):
        Settings(bootstrap=5, whole=False)
