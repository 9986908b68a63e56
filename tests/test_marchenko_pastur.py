"""The Marchenko-Pastur law: against quadrature, random matrices, and the tail fit itself."""

import numpy as np
import pytest
from scipy.integrate import quad

from farms_jax import Tail, marchenko_pastur
from farms_jax.diagnosis.tail_fits import fit_spectra


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_cdf_is_the_integral_of_the_density_and_quantile_its_inverse(ratio, sigma):
    low, high = marchenko_pastur.edges(ratio, sigma)
    places = np.linspace(low, high, 6)[1:-1]
    shares = [quad(lambda x: marchenko_pastur.density(x, ratio, sigma), low, place, limit=500)[0] for place in places]
    np.testing.assert_allclose(marchenko_pastur.cdf(places, ratio, sigma), shares, rtol=1e-8)
    np.testing.assert_allclose(marchenko_pastur.quantile(shares, ratio, sigma), places, rtol=1e-6)
    outside = [low - 0.1, low, high, high + 1]
    np.testing.assert_allclose(marchenko_pastur.cdf(outside, ratio, sigma), [0, 0, 1, 1], atol=1e-12)
    np.testing.assert_array_equal(marchenko_pastur.density([low - 0.1, high + 0.1], ratio, sigma), 0)
    np.testing.assert_allclose(marchenko_pastur.quantile([0, 1], ratio, sigma), [low, high], atol=1e-12)


def noise(rows, cols, seed=0, sigma=1.0):
    matrix = sigma * np.random.default_rng(seed).standard_normal((rows, cols))
    return np.sort(np.linalg.svd(matrix, compute_uv=False) ** 2)


@pytest.mark.parametrize(("rows", "cols"), [(300, 300), (300, 1200), (500, 300)])
def test_random_matrices_follow_the_law_and_its_alpha(rows, cols):
    values, ratio, longer = noise(rows, cols), min(rows, cols) / max(rows, cols), max(rows, cols)
    expected = marchenko_pastur.cdf(values / longer, ratio)
    steps = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(expected - steps).max() < 0.02
    (alpha,) = fit_spectra(values[None], Tail()).alpha
    assert abs(alpha / marchenko_pastur.hill_alpha(ratio) - 1) < 0.05


def test_alpha_of_noise_has_known_values_and_grows_with_the_aspect_ratio():
    assert abs(marchenko_pastur.hill_alpha(1.0) - 2.1217) < 1e-4
    alphas = [marchenko_pastur.hill_alpha(ratio) for ratio in (1.0, 0.7, 0.3, 0.1)]
    assert alphas == sorted(alphas)
    ratio, rule = 0.4, 4.0
    start = marchenko_pastur.quantile(1 / rule, ratio)
    top = marchenko_pastur.edges(ratio)[1]
    mean = quad(lambda x: marchenko_pastur.density(x, ratio) * np.log(x / start), start, top)[0] / (1 - 1 / rule)
    assert abs(marchenko_pastur.hill_alpha(ratio, rule) - (1 + 1 / mean)) < 1e-6


def test_the_bulk_is_found_beside_spikes():
    rng = np.random.default_rng(1)
    spikes = 3 * rng.standard_normal((100, 10)) @ rng.standard_normal((10, 300))
    values = np.linalg.svd(0.5 * rng.standard_normal((100, 300)) + spikes, compute_uv=False) ** 2
    bulk = marchenko_pastur.fit(values, 300, 100)
    assert abs(bulk.sigma / 0.5 - 1) < 0.1
    assert int((values > bulk.threshold).sum()) == 10
    assert 0 < bulk.low < bulk.high < bulk.threshold < 1.2 * bulk.high
    assert marchenko_pastur.fit(np.zeros(5), 5, 7) == (0, 0, 0, 0)
    assert marchenko_pastur.fit([2.0], 1, 1).sigma > 0


def test_noise_alone_passes_the_threshold_in_one_of_a_hundred():
    spectra = [noise(40, 60, seed, sigma=0.2) for seed in range(300)]
    ratios = np.array([values[-1] / marchenko_pastur.fit(values, 40, 60).threshold for values in spectra])
    assert 0 < np.mean(ratios > 1) < 0.02
    assert np.median(ratios) > 0.8  # and it is not far above


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marchenko_pastur.edges(1.5), "ratio must be in"),
        (lambda: marchenko_pastur.density(1.0, 0.0), "ratio must be in"),
        (lambda: marchenko_pastur.cdf(1.0, 0.5, -1.0), "sigma must be above 0"),
        (lambda: marchenko_pastur.quantile([0.5, 1.1], 0.5), "p must be in"),
        (lambda: marchenko_pastur.hill_alpha(0.5, 1.0), "xmin_pos must be above 1"),
        (lambda: marchenko_pastur.fit([], 3, 4), "needs eigenvalues"),
    ],
)
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
