"""WeightWatcher's rules against plain readings of them; `with_torch` has them against WeightWatcher itself."""

import numpy as np
import pytest

from farms_jax.diagnosis.weightwatcher import erg_tail, fit_noise, fit_power_law, without_fingers
from tests.helpers import power_law
from tests.oracle import fit

RNG = np.random.default_rng(0)
NOISE = np.linalg.svd(RNG.standard_normal((60, 90)), compute_uv=False)[::-1] ** 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("values", [NOISE, power_law(2, 300), np.concatenate([np.zeros(4), NOISE])], ids=str.__class__)
def test_the_product_of_the_tail_passes_one(values, scale):
    count, least = erg_tail(values * scale)
    logs = np.log(values[values > 0] / values.mean())
    assert logs[-count:].sum() < 0 < logs[1 - count :].sum()
    np.testing.assert_allclose(least, values[-count] * scale)


def test_the_product_of_equal_values_is_no_tail():
    assert erg_tail(np.ones(5)) == (0, 1.0)


def test_thresholds_of_a_power_law_are_absolute():
    values = power_law(2.5, 400)
    alpha, distance, start = min((fit(values, i) + (values[i],) for i in range(399)), key=lambda found: found[1])
    found = fit_power_law(np.concatenate([[0.0, 1e-6], values]))
    np.testing.assert_allclose(found[:3], (alpha, distance, start), rtol=1e-10)
    np.testing.assert_allclose(found.sigma, (alpha - 1) / (values >= start).sum() ** 0.5, rtol=1e-10)
    assert fit_power_law(1e-9 * NOISE) is None


def test_few_eigenvalues_have_one_degree_of_freedom_less():
    values = power_law(2, 9, seed=4)
    spreads = [np.log(values[i:] / values[i]).sum() for i in (0, 1)]  # tails of at least eight
    assert any(np.isclose(fit_power_law(values).alpha, 1 + (8 - i) / spreads[i]) for i in (0, 1))


def test_fingers_are_what_raises_alpha():
    body = power_law(3, 40)
    raw = fit_power_law(body)
    assert without_fingers(body, raw) == (raw, 0)
    found, count = without_fingers(body, raw._replace(alpha=raw.alpha + 20))  # as if its end had raised it
    assert (found, count) == (fit_power_law(body[:-2]), 1)
    assert without_fingers(body[:10], fit_power_law(body[:10])) is None  # nine are cut


def test_noise_has_no_spikes_and_spikes_are_counted():
    weight = RNG.standard_normal((60, 90))
    assert fit_noise(NOISE, 1.5, 60).num_spikes == 0
    spiked = weight + 2 * np.outer(RNG.standard_normal(60), RNG.standard_normal(90))
    noise = fit_noise(np.linalg.svd(spiked, compute_uv=False)[::-1] ** 2, 1.5, 60)
    assert noise.num_spikes == 1
    assert noise.softrank < 0.1
