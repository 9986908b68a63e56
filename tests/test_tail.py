"""The tail's fit: known answers, degenerate spectra, memory; drawn spectra are in `faults/test_properties.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import power_law

from farms_jax import Tail, fit_tail

RULES = ["median", "peak", "ks"]
compiled_fit = jax.jit(fit_tail, static_argnames="tail")


def fit(values, tail, length=1000):
    """The fit of a spectrum, padded to one length, for which each rule is compiled once."""
    return compiled_fit(jnp.pad(jnp.asarray(values, jnp.float32), (length - len(values), 0)), tail, len(values))


@pytest.mark.parametrize("alpha", [1.8, 7.0])
@pytest.mark.parametrize("rule", RULES)
def test_power_law_gives_its_exponent(rule, alpha):
    found = fit(power_law(alpha, 20_000), Tail(rule), length=20_000)
    np.testing.assert_allclose(found.alpha, alpha, rtol=0.03)
    assert found.ks_distance < 0.02


MANY = {
    "power law": lambda rng, n: power_law(2.0, n),
    "bulk": lambda rng, n: np.linalg.svd(rng.standard_normal((n // 2, n)), compute_uv=False) ** 2,
    "two bulks": lambda rng, n: np.concatenate([rng.uniform(0.1, 0.2, n // 2), rng.uniform(5, 9, n // 2)]),
    "rounded": lambda rng, n: np.round(power_law(3.0, n), 1),
    "exponential": lambda rng, n: rng.exponential(size=n),
}


@pytest.mark.parametrize("rule", ["peak", "ks"])
@pytest.mark.parametrize("kind", MANY)
def test_the_search_finds_what_the_plain_search_finds(rule, kind):
    """Of near ties another one is right as well: its distance in float64 is the smallest but for rounding."""
    values = np.sort(MANY[kind](np.random.default_rng(0), 1000)).astype(np.float32).astype(np.float64)
    found = fit(values, Tail(rule))
    _, smallest, _ = oracle.tail(values, rule)
    chosen = range(*(np.searchsorted(values, np.float64(found.xmin), side) for side in ("left", "right")))
    alpha, distance = min((oracle.fit(values, i) for i in chosen), key=lambda fit: fit[1])
    np.testing.assert_allclose([found.ks_distance, distance], smallest, atol=3e-6)
    np.testing.assert_allclose(found.alpha, alpha, rtol=1e-5)


def test_peak_compares_a_logarithm_with_eigenvalues():
    # All eigenvalues stand far above the peak's logarithm but below the peak: the lower bound cuts none of them.
    values = np.sort(np.concatenate([np.full(50, 20.0) + np.arange(50) * 1e-3, power_law(3.0, 300, xmin=3.0)]))
    values = values.astype(np.float32).astype(np.float64)
    found = fit(values, Tail("peak"))
    np.testing.assert_allclose(found.alpha, oracle.tail(values, "peak")[0], rtol=1e-5)
    assert found.xmin < 0.95 * 20


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "values", [np.zeros(20), np.full(20, 3.0), np.r_[np.zeros(19), 2.0]], ids=["zeros", "equal", "rank 1"]
)
def test_no_tail_is_alpha_zero(values, rule):
    found = fit(values, Tail(rule))
    assert (float(found.alpha), float(found.ks_distance), float(found.xmin)) == (0, 1, 0)


@pytest.mark.parametrize("rule", ["peak", "ks"])
def test_memory_is_bounded_at_half_a_million(rule):
    shape = jax.ShapeDtypeStruct((500_000,), jnp.float32)
    memory = jax.jit(lambda e: fit_tail(e, Tail(rule))).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 500e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"xmin": "xmin_mid"}, "'median', 'peak' or 'ks', got 'xmin_mid'"),
        ({"xmin_pos": 1}, "xmin_pos must be above 1"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"min_count": 1}, "min_count must be at least 2"),
    ],
)
def test_tail_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Tail(**settings)
