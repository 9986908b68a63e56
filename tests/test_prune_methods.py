"""Scores, masks and SparseGPT against the reference's figures and plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax.errors import InputError
from prune.methods import Groups, lowest, lowest_of_groups, lowest_of_rows, magnitude, wanda, wanda_variant
from prune.sparsegpt import factorise, sparsegpt
from tests.helpers import few, load_cases

FIXTURE, ARRAYS = load_cases("prune_layer")
RNG = np.random.default_rng(3)
# Full of ties, with zeros, tiny and huge numbers.
TIED = RNG.choice(np.array([0.0, 1e-38, 0.5, 1.0, 1.0000001, 3e38], np.float32), (7, 24))
PLAIN = RNG.gamma(0.5, 1.0, (9, 40)).astype(np.float32)


@pytest.fixture(params=[TIED, PLAIN], ids=["tied", "plain"])
def scores(request):
    return request.param


def test_lowest_takes_all_up_to_the_kth(scores):
    ordered = np.sort(scores.ravel())
    for position in (0, 1, scores.size // 2, scores.size - 1):
        np.testing.assert_array_equal(lowest(jnp.asarray(scores), position), scores <= ordered[position])


def test_lowest_of_rows_is_a_stable_sort(scores):
    order = np.argsort(scores, axis=1, kind="stable")
    for count in (0, 10, scores.shape[1]):
        expected = np.zeros(scores.shape, bool)
        np.put_along_axis(expected, order[:, :count], True, axis=1)
        np.testing.assert_array_equal(lowest_of_rows(jnp.asarray(scores), count), expected)


@pytest.mark.parametrize(("count", "group"), few([(2, 4), (0, 4), (8, 8)], 3))
def test_lowest_of_groups_is_a_stable_sort_of_each(scores, count, group):
    groups = scores.reshape(-1, group)
    expected = np.zeros(groups.shape, bool)
    np.put_along_axis(expected, np.argsort(groups, axis=1, kind="stable")[:, :count], True, axis=1)
    found = lowest_of_groups(jnp.asarray(scores), count, group)
    np.testing.assert_array_equal(found, expected.reshape(scores.shape))


def test_minus_zero_is_the_lowest():
    np.testing.assert_array_equal(lowest_of_rows(jnp.array([[1.0, -0.0, 2.0]]), 1), [[False, True, False]])


@pytest.mark.parametrize("case", few(FIXTURE["cases"], 4), ids=lambda case: f"{case['case']}-{case['layer']}")
def test_sparsegpt_equals_the_reference(case):
    weight, hessian = (jnp.asarray(ARRAYS[f"{case['layer']}/{name}"]) for name in ("W", "H"))
    groups = Groups(case["prune_n"], case["prune_m"]) if case["prune_m"] else None
    factor = factorise(hessian, case["percdamp"])
    found, kept = sparsegpt(weight, factor, case["sparsity"], groups, case["blocksize"])
    expected = ARRAYS[f"out/{case['case']}"]
    np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)
    np.testing.assert_array_equal(np.asarray(kept) | (np.asarray(found) == 0), True)
    assert not np.asarray(found)[~np.asarray(kept)].any()
    # The reference's own float32 is this far from its float64.
    np.testing.assert_allclose(found, expected, atol=max(1e-6, 5 * case["max_abs_difference_to_float64_run"]))
    assert factor.damping == case["percdamp"]
    if case["dead_column"] is not None:
        assert np.flatnonzero(factor.dead).tolist() == [case["dead_column"]]


@pytest.mark.parametrize("layer", sorted({case["layer"] for case in FIXTURE["cases"]}))
def test_factor_is_the_cholesky_factor_of_the_inverse(layer):
    hessian = ARRAYS[f"{layer}/H"].astype(np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    expected = np.linalg.cholesky(np.linalg.inv(hessian)).T
    upper = factorise(jnp.asarray(ARRAYS[f"{layer}/H"])).upper
    np.testing.assert_allclose(upper, expected, atol=2e-4 * np.abs(expected).max())
    assert not np.tril(upper, -1).any()


def test_damping_is_raised_until_it_is_enough():
    hessian = np.diag(np.r_[np.full(31, 1.0), -0.05]).astype(np.float32)
    factor = factorise(jnp.asarray(hessian), 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert np.isfinite(factor.upper).all()


@pytest.mark.parametrize("hessian", [np.full((4, 4), np.nan), np.diag([1.0, 1, 1, -99])])
def test_a_hopeless_hessian_is_an_error(hessian):
    with pytest.raises(InputError, match=r"blocks\.0\.q.*cannot be factorised"):
        factorise(jnp.asarray(hessian, jnp.float32), 0.01, "blocks.0.q")


def test_sparsity_zero_removes_nothing():
    weight = jnp.asarray(ARRAYS["layer_64x96/W"])
    squares = jnp.ones(96)
    assert np.asarray(magnitude(weight, 0.0)).all()
    assert np.asarray(wanda(weight, squares, 0.0)).all()
    found, kept = sparsegpt(weight, factorise(jnp.asarray(ARRAYS["layer_64x96/H"])), 0.0)
    assert np.asarray(kept).all()
    np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("sparsity", [0.1, 0.77])
def test_counts_are_rounded_as_in_the_reference(sparsity):
    weight = jnp.asarray(ARRAYS["layer_48x300/W"])
    assert int((~magnitude(weight, sparsity)).sum()) == int(48 * 300 * sparsity) + 1
    per_row = (~np.asarray(wanda(weight, jnp.asarray(RNG.uniform(size=300), jnp.float32), sparsity))).sum(1)
    assert (per_row == int(300 * sparsity)).all()


def test_groups_of_every_row():
    weight = jnp.asarray(ARRAYS["layer_64x96/W"])
    squares = jnp.asarray(ARRAYS["layer_64x96/scaler_row"])
    factor = factorise(jnp.asarray(ARRAYS["layer_64x96/H"]))
    groups = Groups(5, 6)
    kept = [magnitude(weight, 0, groups), wanda(weight, squares, 0, groups), sparsegpt(weight, factor, 0, groups)[1]]
    for mask in kept:
        assert (np.asarray(mask).reshape(-1, 6).sum(1) == 1).all()
    for i, scores in enumerate((np.abs(weight), np.abs(weight) * np.sqrt(squares))):
        largest = np.asarray(scores).reshape(-1, 6).argmax(1)
        np.testing.assert_array_equal(np.asarray(kept[i]).reshape(-1, 6).argmax(1), largest)


@pytest.mark.parametrize("sparsity", [0.2, 0.6])
def test_variant_reaches_the_sparsity_with_rows_that_differ(sparsity):
    weight = jnp.asarray(ARRAYS["layer_48x300/W"])
    removed = ~np.asarray(wanda_variant(weight, jnp.asarray(ARRAYS["layer_48x300/scaler_row"]), sparsity))
    assert removed.mean() == pytest.approx(sparsity, abs=0.01)
    assert len(set(removed.sum(1))) > 1
