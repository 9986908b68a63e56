"""Scores, masks and SparseGPT against the reference's figures and plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax.errors import InputError
from prune.admm import GROWTH, STEPS, admm, normalise
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


@pytest.mark.parametrize("prepare", [factorise, normalise])
@pytest.mark.parametrize("hessian", [np.full((4, 4), np.nan), np.diag([1.0, 1, 1, -99])])
def test_a_hopeless_hessian_is_an_error(hessian, prepare):
    with pytest.raises(InputError, match=r"blocks\.0\.q.*cannot be factorised"):
        prepare(jnp.asarray(hessian, jnp.float32), 0.01, "blocks.0.q")


def expected_admm(weight, hessian, removed, group, steps, polish):
    """ADMM in the papers' terms, in float64, with sorts and solvers: the weights, and the mask of those kept."""
    dead = np.diag(hessian) == 0
    norms = np.where(dead, 1, np.sqrt(np.diag(hessian)))
    hessian = hessian / np.outer(norms, norms) + np.diag(0.1 + dead)
    dense = weight * norms
    w, u, kept = dense, np.zeros_like(dense), np.ones(dense.shape, bool)
    for step in range(steps):
        if step < GROWTH:
            count = round(removed * (1 - (1 - (step + 1) / GROWTH) ** 3))
            groups = np.where(dead, 0, np.abs(w + u)).reshape(-1, group)
            kept = np.ones(groups.shape, bool)
            np.put_along_axis(kept, np.argsort(groups, axis=1, kind="stable")[:, :count], False, axis=1)
            kept = kept.reshape(dense.shape)
        z = np.where(kept, w + u, 0)
        u = u + w - z
        w = np.linalg.solve(hessian + np.eye(len(hessian)), (dense @ hessian + z - u).T).T
    found = np.where(kept, w, 0)
    for row, mask, target in zip(found, kept, dense, strict=True):
        residual = ((target - row) @ hessian)[mask]
        direction = residual
        for _ in range(polish):
            product = hessian[np.ix_(mask, mask)] @ direction
            length = residual @ residual / (direction @ product)
            row[mask] += length * direction
            after = residual - length * product
            direction = after + (after @ after) / (residual @ residual) * direction
            residual = after
    return found / norms, kept


@pytest.mark.parametrize(
    ("groups", "steps", "polish"),
    few([(None, STEPS, 10), (Groups(2, 4), STEPS, 1), (None, 1, 0), (None, 7, 2), (None, GROWTH, 0)], 2),
)
def test_admm_equals_the_papers_in_float64(groups, steps, polish):
    weight = RNG.standard_normal((12, 24)).astype(np.float32)
    inputs = RNG.standard_normal((60, 24)) @ RNG.standard_normal((24, 24)) * RNG.uniform(0.1, 10, 24)
    inputs[:, 3] = 0
    hessian = (inputs.T @ inputs).astype(np.float32)
    found, kept = admm(jnp.asarray(weight), normalise(jnp.asarray(hessian)), 0.6, groups, steps=steps, polish=polish)
    removed, group = groups or (14, 24)
    expected, mask = expected_admm(np.float64(weight), np.float64(hessian), removed, group, steps, polish)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.asarray(found)[~mask].any()


def test_admm_removes_weights_of_dead_inputs_first_and_leaves_the_others_alone():
    weight, hessian = ARRAYS["layer_64x96/W"].copy(), ARRAYS["layer_64x96/H"].copy()
    hessian[:4], hessian[:, :4] = 0, 0
    found, kept = (np.asarray(array) for array in admm(jnp.asarray(weight), normalise(jnp.asarray(hessian)), 0.03))
    assert not kept[:, :2].any()  # of dead inputs the first
    assert kept[:, 2:].all()
    np.testing.assert_array_equal(found[:, 2:4], weight[:, 2:4])
    np.testing.assert_allclose(found[:, 4:], weight[:, 4:], rtol=1e-3, atol=1e-5)  # nothing to make up for


def test_sparsity_zero_removes_nothing():
    weight = jnp.asarray(ARRAYS["layer_64x96/W"])
    squares = jnp.ones(96)
    assert np.asarray(magnitude(weight, 0.0)).all()
    assert np.asarray(wanda(weight, squares, 0.0)).all()
    found, kept = sparsegpt(weight, factorise(jnp.asarray(ARRAYS["layer_64x96/H"])), 0.0)
    assert np.asarray(kept).all()
    np.testing.assert_array_equal(found, weight)
    found, kept = admm(weight, normalise(jnp.asarray(ARRAYS["layer_64x96/H"])), 0.01)  # of 96 inputs
    assert np.asarray(kept).all()
    np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize(("sparsity", "groups"), [(0.0, None), (0.25, None), (0.75, None), (0.25, Groups(1, 4))])
def test_weights_of_dead_inputs_go_first_and_the_others_stay_as_they_are(sparsity, groups):
    weight, dead = RNG.standard_normal((8, 64)).astype(np.float32), np.arange(64) % 8 < 5
    inputs = RNG.standard_normal((200, 64)) * ~dead
    factor = factorise(jnp.asarray(inputs.T @ inputs, jnp.float32))
    found, kept = map(np.asarray, sparsegpt(jnp.asarray(weight), factor, sparsity, groups))
    np.testing.assert_array_equal(found != 0, kept)
    np.testing.assert_array_equal(found[:, dead], np.where(kept, weight, 0)[:, dead])
    if groups:
        assert ((~kept).reshape(8, 16, 4).sum(-1) == 1).all()
        return
    count = int(weight.size * sparsity) + (sparsity > 0)
    assert (~kept).sum() == count
    of_dead = np.sort(np.abs(weight[:, dead]).ravel())
    np.testing.assert_array_equal(np.sort(np.abs(weight[~kept & dead])), of_dead[:count])


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
    kept.append(admm(weight, normalise(jnp.asarray(ARRAYS["layer_64x96/H"])), 0, groups)[1])
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
