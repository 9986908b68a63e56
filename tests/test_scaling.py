"""Measures at every scale: of w, 1e-30 w and 1e30 w, of one huge entry, and at the limits of float16."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import farms_jax
from farms_jax import FLAX_AXES, Window
from farms_jax._scaling import in_range, in_range_traced, times_power
from farms_jax._windows import make_grid
from farms_jax.solvers.dispatch import Cut, Options, pooled_eigenvalues

SHAPES = {"square": (64, 64), "wide": (24, 96), "kernel": (3, 3, 8, 16), "complex": (24, 32)}
SCALES = [2.0**-110, 2.0**110, 1e-30, 1e30, 3e36]
NUMBERS = ["alpha", "ks_distance", "alpha_low", "alpha_high", "noise_alpha", "whole_alpha", "whole_stable_rank"]
NUMBERS += ["effective_rank", "rand_distance"]
EXACT = ["status", "rank", "rank_low", "rank_high", "matrix_rank", "mp_spikes", "num_tail"]


def trained():
    """Weights by name whose directions decay, in float32."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        weight = rng.normal(size=shape) * np.arange(1, shape[-1] + 1) ** -0.8
        weights[name] = weight.astype(np.float32)
    weights["complex"] = (weights["complex"] * np.exp(1j * np.arange(32))).astype(np.complex64)
    return weights


@pytest.fixture(scope="module")
def measured():
    """Report and diagnosis of the weights as they are."""
    return farms_jax.analyze(trained()), farms_jax.diagnose(trained(), resamples=20)


def log_alpha(report):
    """log10 of the largest eigenvalue, which may itself be beyond float32."""
    return np.asarray(report.alpha_hat) / np.asarray(report.alpha)


@pytest.mark.parametrize("scale", SCALES)
def test_measures_are_those_of_any_multiple(measured, scale):
    report, diagnosis = measured
    scaled = {name: weight * np.float32(scale) for name, weight in trained().items()}
    other = farms_jax.analyze(scaled)
    for name in ("alpha", "ks_distance", "stable_rank"):
        np.testing.assert_allclose(getattr(other, name), getattr(report, name), rtol=2e-5)
    np.testing.assert_array_equal(other.num_eigenvalues, report.num_eigenvalues)
    np.testing.assert_allclose(log_alpha(other), log_alpha(report) + 2 * np.log10(scale), rtol=1e-5, atol=1e-4)
    found = farms_jax.diagnose(scaled, resamples=20)
    for name in NUMBERS:
        np.testing.assert_allclose(found.column(name), diagnosis.column(name), rtol=1e-5, atol=1e-6, err_msg=name)
    for name in EXACT:
        assert found.column(name) == diagnosis.column(name), name
    norm = np.array(diagnosis.column("whole_norm")) * scale**2
    np.testing.assert_allclose(found.column("whole_norm"), norm, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_spectra_of_every_platform_hold_at_every_scale(platform, solver):
    weight = trained()["square"]
    scaled = [jnp.asarray(weight * np.float32(scale)) for scale in (1, 2.0**-90, 2.0**90)]
    cut = Cut(FLAX_AXES.of(2), make_grid(Window(rows=32, stride=32), (1, 64, 64), is_kernel=False))
    options = Options(platform, solver, False, 1)  # one window at a time: on CPU batches may wait forever
    whole, small, large = pooled_eigenvalues(scaled, [cut] * 3, options)
    for spectra, exponent in ((small, -90), (large, 90)):
        powers = spectra.exponents[:, None, None] - exponent
        np.testing.assert_array_equal(times_power(spectra.values, 2 * powers), whole.values)


@pytest.mark.parametrize("huge", [1e3, 1e10, 1e20])
def test_one_huge_entry_hides_no_other(huge):
    weight = trained()["square"]
    weight[3, 5] = huge
    windows = [weight.astype(float)[i : i + 32, j : j + 32] for i in (0, 32) for j in (0, 32)]
    expected = oracle.tail(oracle.eigenvalues(windows), "median")[0]
    window = Window(rows=32, stride=32)
    assert float(farms_jax.analyze({"w": weight}, window=window).alpha[0]) == pytest.approx(expected, rel=1e-5)
    (alpha,) = farms_jax.diagnose({"w": weight}, window=window, resamples=0).column("alpha")
    assert alpha == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(np.float16, 65504), (np.float16, 2.0**-16), (ml_dtypes.bfloat16, 3e38)]
)
def test_half_precision_at_its_limits(dtype, largest):
    weight = trained()["square"]
    weight = (weight * (largest / np.abs(weight).max())).astype(dtype)
    window = Window(rows=32, stride=32)
    same = weight.astype(float) / largest
    windows = [same[i : i + 32, j : j + 32] for i in (0, 32) for j in (0, 32)]
    expected = oracle.tail(oracle.eigenvalues(windows), "median")[0]
    assert float(farms_jax.analyze({"w": weight}, window=window).alpha[0]) == pytest.approx(expected, rel=1e-4)
    (alpha,) = farms_jax.diagnose({"w": weight}, window=window, resamples=0).column("alpha")
    assert alpha == pytest.approx(expected, rel=1e-5)


def test_zeros_and_subnormals():
    zeros, least = np.zeros((64, 64), np.float32), (trained()["square"] * np.float32(1e-42)).astype(np.float32)
    assert float(farms_jax.analyze({"w": zeros}).alpha[0]) == 0
    assert farms_jax.diagnose({"w": zeros}, resamples=0).column("reason") == ["every weight is zero"]
    # XLA counts subnormals of float32 as zero; a diagnosis prepares its matrices in NumPy.
    expected = farms_jax.diagnose({"w": least.astype(float) * 1e42}, resamples=0).column("alpha")
    np.testing.assert_allclose(farms_jax.diagnose({"w": least}, resamples=0).column("alpha"), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, -3.0], [2.0**31, 1.0], [-(2.0**-40), 0.0], [3e38, 1.0], [np.inf, 1.0]]
)
def test_a_layer_is_divided_by_a_power_of_two_only_where_it_must_be(values):
    stack = np.array(values, np.float32)
    scaled, exponent = in_range(stack)
    traced, same = in_range_traced(jnp.asarray(stack))
    assert int(same) == exponent
    np.testing.assert_array_equal(traced, scaled)
    np.testing.assert_array_equal(np.ldexp(scaled, exponent), stack)
    assert exponent == 0 or np.abs(scaled).max() < 2.0**30
    assert (exponent != 0) == any(np.isfinite(v) and v and not 2.0**-31 <= abs(v) < 2.0**30 for v in values[:1])
