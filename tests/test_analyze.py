"""analyze(): layouts, what is left out, options, degenerate weights, tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import farms_jax
from farms_jax import Tail, Window, analyze
from farms_jax._axes import as_matrices
from farms_jax._windows import make_grid
from farms_jax.errors import LeftOutWarning


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def complex_normal(*shape, seed=0):
    return (normal(*shape, seed=seed) + 1j * normal(*shape, seed=seed + 100)).astype(np.complex64)


PARAMS = {
    "conv_2": {"kernel": normal(3, 3, 8, 16), "bias": normal(16)},
    "conv_10": {"kernel": complex_normal(1, 2, 12, 5, seed=1)},
    "dense": {"kernel": normal(40, 24, seed=2), "bias": normal(24)},
}


def oracle_alphas(weight, window, tail):
    """Alpha of each division by plain loops."""
    stack = as_matrices(weight, farms_jax.FLAX_AXES.of(weight.ndim))[0] * np.sqrt(0.5 if weight.ndim == 4 else 1)
    grid = make_grid(window, stack.shape, is_kernel=weight.ndim == 4)
    stack = stack.swapaxes(1, 2) if grid.transposed else stack
    per_division = len(grid.starts) // grid.divisions
    alphas = []
    for d in range(grid.divisions):
        starts = grid.starts[d * per_division : (d + 1) * per_division]
        windows = [matrix[i : i + grid.rows, j : j + grid.cols] for matrix in stack for i, j in starts]
        values = oracle.eigenvalues(windows)
        alphas.append(oracle.tail(values, tail.xmin, min_eigenvalue=tail.min_eigenvalue)[0])
    return alphas


CASES = [
    (Window(), Tail("median")),
    (Window(), Tail("ks")),
    (Window(rows=7, per_axis=3), Tail("peak")),
    (Window(aspect_ratio=2.0, stride=5), Tail("ks", min_eigenvalue=1e-5)),
    (None, Tail("peak", min_eigenvalue=1e-5)),
]


@pytest.mark.parametrize(("window", "tail"), CASES)
def test_equals_the_oracle_under_strict_promotion(window, tail):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        report = analyze(PARAMS, window=window, tail=tail)
        for mapping in farms_jax.mappings.NAMED:
            farms_jax.lr_scale(report, PARAMS, mapping=mapping)
    assert report.names == ("conv_2/kernel", "conv_10/kernel", "dense/kernel")  # natural order
    for name, alpha in zip(report.names, report.alpha, strict=True):
        expected = np.mean(oracle_alphas(PARAMS[name.split("/")[0]]["kernel"], window, tail))
        np.testing.assert_allclose(alpha, expected, rtol=1e-3, err_msg=name)


def test_every_leaf_is_in_the_report_or_left_out_with_its_reason():
    params = {
        "a": {"kernel": normal(20, 10), "bias": normal(10)},
        "b": {"kernel": normal(3, 4, 5)},
        "counts": np.arange(30).reshape(5, 6),
        "spectral": normal(5, 6, 6) + 1j,
        "tiny": normal(2, 40),
        "square": normal(4, 4),
        "empty": np.zeros((0, 7), np.float32),
        "number": 3.0,
        "head": normal(20, 10),
        "key": jax.random.key(0),
    }
    with pytest.warns(LeftOutWarning, match="b/kernel, spectral"):
        report = analyze(params, exclude=("head",))
    assert report.names == ("a/kernel",)
    undeclared = "3 axes: say with `axes` or `stack` what they count"
    assert dict(report.left_out) == {
        "a/bias": "bias, norm or other vector",
        "b/kernel": undeclared,
        "counts": "dtype int64, not floating point",
        "spectral": undeclared,
        "tiny": "too thin for a fit",
        "square": "too few eigenvalues: 4, fewer than 5",
        "empty": "empty",
        "number": "not an array but float",
        "head": "excluded",
        "key": "dtype key<fry>, not floating point",
    }
    assert "left out (excluded): head" in str(report)
    assert not analyze({"m": normal(4, 30)}, window=None).names
    assert len(analyze({"m": normal(4, 30)}, window=None, tail=Tail(min_count=4))) == 1


def test_exclude_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"exclude: 'dense' matches no name as a whole; names are: conv_2/bias"):
        analyze(PARAMS, exclude="dense")
    with pytest.raises(ValueError, match="not a regular expression"):
        analyze(PARAMS, exclude="(")
    assert analyze(PARAMS, exclude=("dense/.*", "conv_10/.*")).names == ("conv_2/kernel",)


def test_divisions_pooled_or_mean():
    kernel = {"k": normal(3, 3, 5, 17)}
    mean = analyze(kernel, eigenvalues=True)
    pooled = analyze(kernel, window=Window(divisions="pooled"), eigenvalues=True)
    assert mean.eigenvalues[0].shape == (3, 45)
    assert pooled.eigenvalues[0].shape == (1, 135)
    spectrum = np.sort(np.ravel(mean.eigenvalues[0]))
    np.testing.assert_allclose(pooled.eigenvalues[0][0], spectrum, rtol=1e-6)
    np.testing.assert_allclose(pooled.alpha[0], oracle.tail(spectrum.astype(float), "median")[0], rtol=1e-4)
    np.testing.assert_allclose(mean.alpha[0], np.mean(oracle_alphas(kernel["k"], Window(), Tail())), rtol=1e-4)
    assert analyze(kernel).eigenvalues is None


def test_measures():
    matrix = normal(30, 20)
    row = analyze({"m": matrix}, window=None).to_dict()["m"]
    values = np.linalg.svd(matrix.astype(float), compute_uv=False) ** 2
    alpha, distance, xmin = oracle.tail(values[::-1], "median")
    expected = {
        "alpha": alpha,
        "ks_distance": distance,
        "xmin": xmin,
        "largest_eigenvalue": values[0],
        "norm": values.sum(),
        "stable_rank": values.sum() / values[0],
        "alpha_hat": alpha * np.log10(values[0]),
        "num_eigenvalues": 20,
        "num_params": 600,
    }
    assert set(row) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(row[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("rule", ["median", "peak", "ks"])
def test_zero_and_constant_weights_have_no_tail(rule):
    params = {
        "zero": np.zeros((8, 8), np.float32),
        "constant": np.full((8, 8), 0.5, np.float32),
        "z": np.zeros((3, 3, 4, 8)),
        "orthogonal": np.linalg.qr(normal(64, 64))[0].astype(np.float32),
    }
    report = analyze(params, tail=Tail(rule))
    np.testing.assert_array_equal(report.alpha, 0)
    np.testing.assert_array_equal(report.ks_distance, 1)
    assert all(np.isfinite(getattr(report, metric)).all() for metric in farms_jax._report.METRICS)
    assert "no tail" in str(report)


def test_layers_with_nan_or_inf_are_named():
    matrix = complex_normal(9, 9)
    matrix[3, 4] = complex(0, np.inf)
    broken = {**PARAMS, "a": np.where(normal(9, 9) > 1, np.nan, 1).astype(np.float32), "a2": matrix}
    with pytest.raises(ValueError, match="NaN or Inf in a, a2; .*exclude"):
        analyze(broken)
    assert not {"a", "a2"} & set(analyze(broken, exclude=("a", "a2")).names)
    traced = jax.jit(lambda params: analyze(params).alpha)(broken)  # no error can be raised
    assert [float(alpha) for alpha in traced[:2]] == [0, 0]


def test_half_precision_weights_are_computed_in_float32():
    half = {"m": jnp.asarray(normal(40, 30), jnp.bfloat16), "k": jnp.asarray(normal(3, 3, 4, 8), jnp.float16)}
    found, expected = analyze(half), analyze({name: np.asarray(weight, np.float32) for name, weight in half.items()})
    assert found.alpha.dtype == jnp.float32
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-6)


def test_one_row_and_empty_trees():
    assert analyze({"rows": normal(4, 40)}).num_eigenvalues[0] == 40  # ten windows of 4 x 4
    for tree in ({}, {"bias": normal(3)}, None, []):
        report = analyze(tree)
        assert len(report) == 0
        assert report.alpha.shape == (0,)
        assert str(report)


def test_an_array_alone_is_a_layer_without_a_name():
    weight = normal(24, 16)
    assert analyze(weight).names == ("",)
    assert analyze(np.stack([weight, weight]), stack=0).names == ("[0]", "[1]")


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
        analyze({"a": {"b": normal(5, 5)}, "a/b": normal(5, 5)})


@pytest.mark.parametrize("settings", [{"solver": "lu"}, {"max_batch_bytes": 0}])
def test_unknown_settings(settings):
    with pytest.raises(ValueError, match=f"analyze: {next(iter(settings))} must be"):
        analyze(PARAMS, **settings)


def test_traced_equals_eager_and_compiles_once():
    traces = []

    @jax.jit
    def alphas(params):
        traces.append(1)
        return analyze(params).alpha

    eager = analyze(PARAMS)
    for _ in range(3):
        np.testing.assert_allclose(alphas(PARAMS), eager.alpha, rtol=1e-6)
    assert len(traces) == 1
    start = jax.tree.map(jnp.asarray, PARAMS)
    _, scanned = jax.lax.scan(lambda carry, _: (carry, analyze(carry).alpha), start, length=2)
    np.testing.assert_allclose(scanned[1], eager.alpha, rtol=1e-6)


def test_vmap_over_seeds():
    stacked = {"m": np.stack([normal(20, 12, seed=seed) for seed in range(3)])}
    alphas = jax.vmap(lambda params: analyze(params).alpha)(stacked)
    for seed in range(3):
        np.testing.assert_allclose(alphas[seed], analyze({"m": stacked["m"][seed]}).alpha, rtol=1e-6)


@pytest.mark.parametrize(("x64", "rtol"), [(False, 1e-5), (True, 1e-12)])
def test_complex_eigenvalues_are_squared_singular_values_each_once(x64, rtol):
    params = {"m": complex_normal(50, 40)}
    expected = np.linalg.svd(params["m"].astype(np.complex128), compute_uv=False)[None, ::-1] ** 2
    with jax.enable_x64(x64):
        report = analyze(params, window=None, eigenvalues=True)
        jitted = jax.jit(lambda params: analyze(params, window=None, eigenvalues=True).eigenvalues)(params)
    assert report.num_params == (2000,)
    for found in (*report.eigenvalues, *jitted):
        assert found.dtype == (np.float64 if x64 else np.float32)
        np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol)


def test_report_is_a_pytree_and_drops_layers():
    report = analyze(PARAMS)
    doubled = jax.tree.map(lambda x: 2 * x, report)
    np.testing.assert_allclose(doubled.alpha, 2 * report.alpha)
    assert doubled.names == report.names
    fewer = report.drop(r"conv_.*")
    assert fewer.names == ("dense/kernel",)
    assert fewer.num_params == (960,)
    assert dict(fewer.left_out)["conv_2/kernel"] == "excluded"
    with pytest.raises(ValueError, match="matches no name"):
        report.drop("nothing")
