"""Properties of the numerics over drawn shapes, dtypes, windows, tail rules and matrices, against a float64 oracle.

The draws are the same every time. Others, and ten times as many:
`FARMS_FUZZ_SEED=1 FARMS_FUZZ_TIMES=10 pytest tests/faults/test_properties.py`.

What compiles for each shape (`analyze`) has few examples; most go to the layers below: windows and their eigenvalues,
which run in numpy, and the fit of a tail, compiled once for each rule on spectra padded to one length.
"""

import contextlib
import math

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st

from farms_jax import Tail, Window, allocate_sparsity, analyze, fit_tail, lr_scale, mappings, marchenko_pastur
from farms_jax._axes import FLAX_AXES, as_matrices
from farms_jax._sparsity import round_to_groups
from farms_jax._windows import make_grid
from farms_jax.solvers.cpu import spectra
from tests.faults.drawing import dense, examples, kernels, numbers, tails, weights, windows
from tests.faults.plain_search import check_fit
from tests.helpers import report_of

LONGEST = 256  # eigenvalues of the spectra that fits are compiled for


def cut(stack, grid):
    """Windows of each division: lists of matrices, of all kernel positions."""
    stack = stack.swapaxes(1, 2) if grid.transposed else stack
    per_division = len(grid.starts) // grid.divisions
    parts = [grid.starts[i : i + per_division] for i in range(0, len(grid.starts), per_division)]
    return [[matrix[i : i + grid.rows, j : j + grid.cols] for matrix in stack for i, j in part] for part in parts]


def laid_out(weight, window):
    """The stack and the grid of a weight."""
    (stack,) = as_matrices(weight, FLAX_AXES.of(weight.ndim))
    return stack, make_grid(window, stack.shape, is_kernel=weight.ndim == 4)


def pooled(weight, window, solver="gram64"):
    """Eigenvalues (D, E) of a weight's windows."""
    stack, grid = laid_out(weight, window)
    return spectra([stack], [grid], solver=solver, max_bytes=2**30)[0]


# Windows


def check_starts(starts, free, window):
    """As many as asked for where they fit, at equal steps from 0, as far as whole steps reach."""
    assert starts[0] == 0 and len(set(np.diff(starts))) <= 1
    if window.stride is not None:
        assert starts == list(range(0, free + 1, window.stride))
        return
    per_axis = window.per_axis or 10
    assert len(starts) == min(per_axis, free + 1)
    if len(starts) > 1:
        assert free - starts[-1] < per_axis - 1 or len(starts) == free + 1


@examples(300)
@given(windows(), st.integers(1, 4), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_every_window_lies_inside_its_matrix(window, positions, rows, cols, is_kernel):
    grid = make_grid(window, (positions, rows, cols), is_kernel=is_kernel)
    height, width = (cols, rows) if grid.transposed else (rows, cols)
    assert 1 <= grid.rows <= height and 1 <= grid.cols <= width
    assert len(set(grid.starts)) == len(grid.starts) >= 1 and len(grid.starts) % grid.divisions == 0
    for i, j in grid.starts:
        assert 0 <= i <= height - grid.rows and 0 <= j <= width - grid.cols
    if window is None:
        assert (grid.rows, grid.cols, grid.starts) == (rows, cols, ((0, 0),))
    elif not is_kernel:
        assert grid.rows <= (window.rows or rows)
        # As wide as asked for, to the next whole column; or as the matrix lets it be.
        assert grid.cols == min(cols, max(1, int(grid.rows * window.aspect_ratio)))
        for axis, free in enumerate((rows - grid.rows, cols - grid.cols)):
            check_starts(sorted({start[axis] for start in grid.starts}), free, window)
    else:
        divisions = max(rows, cols) // min(rows, cols)
        assert len(grid.starts) == divisions
        assert grid.divisions == (divisions if positions * grid.gram_rows >= window.min_division else 1)
        firsts = sorted(i for i, _ in grid.starts)
        assert all(after - before >= grid.rows for before, after in zip(firsts, firsts[1:], strict=False))


# Eigenvalues


@examples(700)
@given(weights(st.one_of(dense, dense, kernels)), windows(), st.sampled_from(["gram", "gram64", "svd"]), st.data())
def test_eigenvalues_are_those_of_the_oracle(weight, window, solver, data):
    stack, grid = laid_out(weight, window)
    # A bound of one byte: window by window.
    [found] = spectra([stack], [grid], solver=solver, max_bytes=data.draw(st.sampled_from([1, 2**16, 2**30])))
    assert found.dtype == np.finfo(weight.dtype).dtype and found.shape == (
        grid.divisions,
        grid.num_eigenvalues(len(stack)),
    )
    assert np.isfinite(found).all() and (found >= 0).all() and (np.diff(found, axis=-1) >= 0).all()
    for values, matrices in zip(found, cut(stack, grid), strict=True):
        expected = oracle.eigenvalues(matrices)
        error = np.abs(values - expected)
        assert (error <= tolerance(expected, weight.dtype, solver, min(grid.rows, grid.cols))).all()


@examples(100)
@given(weights(st.tuples(st.integers(15, 60), st.integers(15, 60)), kinds=("wide", "graded", "noise", "heavy")))
def test_the_upper_half_of_a_spectrum_is_exact_enough_for_alpha(weight):
    """Whatever its range: `gram` detects where float32 is not accurate enough."""
    for window in (None, Window(rows=12, per_axis=2)):
        stack, grid = laid_out(weight, window)
        found, expected = pooled(weight, window, "gram")[0], oracle.eigenvalues(cut(stack, grid)[0])
        middle = len(expected) // 2
        noise = 64 * np.finfo(np.float64).eps * expected.max()
        assert (np.abs(found - expected)[middle:] <= 2e-4 * expected[middle:] + noise).all()


def tolerance(expected, dtype, solver, n):
    """The error models of `analyze`'s docstring, and the rounding to the working precision."""
    eps, top = np.finfo(dtype).eps, expected.max()
    if solver == "svd":
        moved = 8 * eps * np.sqrt(n * top * expected) + 16 * n * eps**2 * top
    else:
        moved = 4 * n * (np.finfo(np.float64).eps if solver == "gram64" else eps) * top
    # What float64's rounding, or an underflow, may make of an eigenvalue that is 0.
    noise = 64 * len(expected) * np.finfo(np.float64).eps * top + np.finfo(dtype).tiny
    return moved + 4 * eps * expected + noise


@examples(150)
@given(weights(dense, dtypes=("float32", "float64")), st.integers(0, 400), numbers)
def test_scaling_by_a_power_of_two_scales_every_eigenvalue(weight, power, number):
    window = Window(rows=1 + number % 20, per_axis=3)
    exponent = power % 9 - 4
    plain, scaled = pooled(weight, window), pooled(np.ldexp(weight, exponent), window)
    np.testing.assert_array_equal(np.ldexp(plain, 2 * exponent), scaled)


# Tails

RULES = {
    "median": Tail(),
    "median at 1.3": Tail(xmin_pos=1.3),
    "median at 3": Tail(xmin_pos=3.0),
    "median, filtered": Tail(min_eigenvalue=1e-5),
    "ks": Tail("ks"),
    "ks, filtered": Tail("ks", min_eigenvalue=1e-2),
    "peak": Tail("peak"),
    "peak of 7 bins": Tail("peak", bins=7),
    "peak of 1 bin, filtered": Tail("peak", bins=1, min_eigenvalue=1e-5),
}


compiled_fit = jax.jit(fit_tail, static_argnames="tail")


def fit(values, tail, *, double=False, longest=LONGEST):
    """The product's fit of a spectrum, padded to one length, as numbers of float64."""
    padded = np.r_[np.zeros(longest - len(values)), values].astype(np.float64 if double else np.float32)
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        found = compiled_fit(padded, tail, np.int32(len(values)))
        return [np.asarray(part).astype(float)[()] for part in found]


@pytest.mark.parametrize(
    ("rule", "double"), [*((rule, False) for rule in RULES), ("median", True), ("ks", True), ("peak", True)]
)
@examples(150)
@given(values=tails())
def test_a_tail_is_that_of_the_oracle(rule, double, values):
    eps = np.finfo(np.float64 if double else np.float32).eps
    check_fit(fit(values, RULES[rule], double=double), values, RULES[rule], eps)


@pytest.mark.parametrize("rule", ["median", "ks"])
@examples(75)
@given(values=tails(), power=st.integers(-20, 20))
def test_alpha_does_not_depend_on_the_scale(rule, values, power):
    alpha, distance, xmin, count = fit(values, RULES[rule])
    scaled = fit(np.ldexp(values, power), RULES[rule])
    assert scaled == [alpha, distance, math.ldexp(xmin, power), count]


# Whole analyses

TREES = {
    "dense": {"a": (40, 24), "d": (7, 30)},
    "convolution": {"conv": (3, 2, 8, 16), "dense": (12, 12)},
}
PLANS = [
    ("convolution", "float32", Window(), Tail()),
    ("convolution", "complex64", None, Tail()),
    ("dense", "float32", Window(rows=9, aspect_ratio=0.5, per_axis=3), Tail("ks")),
    ("convolution", "float32", Window(aspect_ratio=2.0, stride=5, divisions="pooled"), Tail("peak", bins=20)),
    ("dense", "float32", None, Tail("ks", min_eigenvalue=1e-5)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "dtype", "window", "tail"), PLANS)
@examples(40)
@given(data=st.data())
def test_an_analysis_is_that_of_the_oracle(tree, dtype, window, tail, data):
    params = {name: data.draw(weights(st.just(shape), (dtype,))) for name, shape in TREES[tree].items()}
    report = analyze(params, window=window, tail=tail, eigenvalues=True)
    assert report.names == tuple(sorted(params))
    for name, spectrum, alpha, distance, largest, rank in zip(
        report.names, report.eigenvalues, report.alpha, report.ks_distance, report.largest_eigenvalue,
        report.stable_rank, strict=True,
    ):  # fmt: skip
        weight = params[name]
        stack, grid = laid_out(weight, window)
        expected = [oracle.eigenvalues(part) * (0.5 if weight.ndim == 4 else 1) for part in cut(stack, grid)]
        if window is not None and window.divisions == "pooled":
            expected = [np.sort(np.concatenate(expected))]
        for values, exact in zip(np.asarray(spectrum), expected, strict=True):
            assert (np.abs(values - exact) <= tolerance(exact, weight.dtype, "gram64", min(grid.rows, grid.cols))).all()
        fits = [fit(values, tail, longest=1024) for values in np.asarray(spectrum)]
        flat = 3 * marchenko_pastur.hill_alpha(grid.gram_rows / max(grid.rows, grid.cols), tail.xmin_pos)
        fits = [(0, 1) if tail.xmin == "median" and found[0] > flat else found for found in fits]
        tailed = [found[0] for found in fits if found[0] > 0]
        np.testing.assert_allclose(alpha, np.mean(tailed) if tailed else 0, rtol=1e-5)
        np.testing.assert_allclose(distance, np.mean([found[1] for found in fits]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(largest, np.mean([values[-1] for values in spectrum]), rtol=1e-6)
        assert 0 <= rank <= np.asarray(spectrum).shape[1] * (1 + 1e-5)


# Allocation, scales, the law of noise

scores = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


@examples(300)
@given(scores, st.floats(0, 0.99), st.floats(0, 1), st.sampled_from(["scale", "shift"]), numbers)
def test_an_allocation_removes_what_was_asked_for(values, sparsity, epsilon, rule, number):
    rng = np.random.default_rng(number)
    layers = {f"layer{i}": value for i, value in enumerate(values)}
    counts = {name: int(rng.integers(1, 10 ** rng.integers(1, 9))) for name in layers}
    highest = max(sparsity, 0.998)
    epsilon = min(epsilon, 0.99) if rule == "scale" else epsilon
    block_of = (lambda name: name[:6]) if number % 2 else None  # layer1, layer10 ... share one
    found = allocate_sparsity(
        layers, sparsity=sparsity, epsilon=epsilon, num_params=counts, rule=rule, block_of=block_of, highest=highest
    )
    assert list(found) == list(layers)
    assert all(-1e-12 <= value <= highest + 1e-12 for value in found.values())
    total = sum(counts.values())
    np.testing.assert_allclose(
        sum(counts[name] * found[name] for name in layers) / total, sparsity, rtol=1e-9, atol=1e-9
    )
    if block_of is None:
        in_order = [found[name] for name in sorted(layers, key=layers.__getitem__)]
        assert all(after >= before - 1e-12 for before, after in zip(in_order, in_order[1:], strict=False))
    group = int(rng.integers(1, 40))
    removed = round_to_groups(found, counts, group=group, block_of=block_of)
    assert all(0 <= part <= group for part in removed.values())


@examples(150)
@given(
    # All of one length, so that little is compiled; a layer without a tail counts as missing.
    st.lists(st.one_of(st.just(0.0), st.sampled_from([1.5, 2.5]), st.floats(1, 100, width=32)), min_size=5, max_size=5),
    st.floats(0.01, 1),
    st.floats(1, 50),
    st.sampled_from(sorted(mappings.NAMED)),
)
@pytest.mark.slow
def test_rates_stay_within_their_bounds(alphas, low, high, mapping):
    params = {f"layer{i}": {"kernel": np.ones((2, 3)), "bias": np.ones(3)} for i in range(len(alphas))}
    report = report_of(names=[f"layer{i}/kernel" for i in range(len(alphas))], alpha=alphas)
    scale = lr_scale(report, params, low=low, high=high, mapping=mapping)
    fitted_alphas = sorted({np.float32(alpha) for alpha in alphas if alpha > 0})
    for i, alpha in enumerate(alphas):
        factor = float(scale[f"layer{i}"]["kernel"])
        assert factor == float(scale[f"layer{i}"]["bias"])
        if alpha == 0 or len(fitted_alphas) < 2:
            assert factor == 1
        elif mapping in {"linear", "step", "sigmoid"}:
            assert low * (1 - 1e-5) <= factor <= high * (1 + 1e-5)
        else:
            assert 0 <= factor < math.inf
        if mapping == "linear" and len(fitted_alphas) > 1:
            if alpha == fitted_alphas[0]:
                np.testing.assert_allclose(factor, low, rtol=1e-6)
            if alpha == fitted_alphas[-1]:
                np.testing.assert_allclose(factor, high, rtol=1e-5)


@examples(200)
@given(weights(dense, dtypes=("float32", "float64")))
def test_the_law_of_noise_is_finite(weight):
    bulk = marchenko_pastur.fit(pooled(weight, None)[0], *weight.shape)
    assert np.isfinite(bulk).all()
    assert 0 <= bulk.low <= bulk.high <= bulk.threshold and bulk.sigma >= 0


@examples(100)
@given(
    st.integers(1, 400), st.integers(1, 400), st.floats(1e-6, 1e6), st.lists(st.floats(0, 1), min_size=1, max_size=9)
)
def test_quantiles_of_the_law_give_their_shares(rows, cols, sigma, shares):
    ratio = min(rows, cols) / max(rows, cols)
    low, high = marchenko_pastur.edges(ratio, sigma)
    x = marchenko_pastur.quantile(shares, ratio, sigma)
    assert (x >= low * (1 - 1e-9)).all() and (x <= high * (1 + 1e-9)).all()
    np.testing.assert_allclose(marchenko_pastur.cdf(x, ratio, sigma), shares, atol=1e-6)
    assert np.isfinite(marchenko_pastur.density(x, ratio, sigma)).all()
    assert 1 < marchenko_pastur.hill_alpha(ratio) < math.inf
