"""Eigenvalue solvers against float64: the errors that the docstring of `analyze` states."""

import contextlib
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax._axes import FLAX_AXES
from farms_jax._windows import Grid, Window, make_grid
from farms_jax.solvers import accelerator, cpu, dispatch, gram_matrices, two_stage
from farms_jax.solvers.lapack import add_products

EPS = float(np.finfo(np.float32).eps)
KINDS = ["normal", "heavy", "complex normal", "complex heavy"]
TOLERANCES = {  # relative, of the largest eigenvalue over an eigenvalue
    "gram64": lambda ratio: np.where(ratio < 1e9, 2 * EPS, np.inf),
    "gram": lambda ratio: 40 * EPS * ratio,  # n EPS is where it rounds to zero
    "svd": lambda ratio: 8 * EPS * np.sqrt(ratio),
}


@functools.cache
def problem(kind):
    """Stacks and grids of several shapes, and their float64 eigenvalues; of complex ones the last stack is real."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        values = rng.standard_t(1.5, shape) if "heavy" in kind else rng.standard_normal(shape)
        return values.astype(np.float32)

    stacks = [draw(*shape) for shape in [(1, 60, 40), (9, 32, 70), (1, 12, 50), (4, 16, 16), (1, 1, 9)]]
    grids = [
        make_grid(Window(rows=30, per_axis=3), stacks[0].shape, is_kernel=False),
        make_grid(Window(), stacks[1].shape, is_kernel=True),
        make_grid(None, stacks[2].shape, is_kernel=False),
        make_grid(Window(aspect_ratio=2.0), stacks[3].shape, is_kernel=True),
        Grid(1, 1, ((0, 3), (0, 8))),
    ]
    if "complex" in kind:
        stacks = [stack + 1j * draw(*stack.shape) for stack in stacks] + [stacks[0]]
        grids.append(grids[0])
    return stacks, grids, [exact(stack, grid) for stack, grid in zip(stacks, grids, strict=True)]


def exact(stack, grid):
    stack = stack.astype(np.result_type(stack.dtype, np.float64))
    stack = stack.swapaxes(1, 2) if grid.transposed else stack
    values = np.concatenate([
        np.linalg.svd(matrix[i : i + grid.rows, j : j + grid.cols], compute_uv=False)[None] ** 2
        for matrix in stack
        for i, j in grid.starts
    ])
    return np.sort(grid.pool(values), axis=-1)


def check(found, expected, tolerance):
    """Relative error of every eigenvalue within `tolerance(largest / eigenvalue)`."""
    for values, truth in zip(found, expected, strict=True):
        assert values.dtype == np.float32
        values = np.asarray(values, np.float64)
        assert values.shape == truth.shape
        relative = np.abs(values - truth) / truth
        ratio = truth[:, -1:] / truth
        assert (relative <= tolerance(ratio)).all(), (relative / tolerance(ratio)).max()


def check_upper_half(found, expected):
    for values, truth in zip(found, expected, strict=True):
        upper = truth.shape[1] // 2
        np.testing.assert_allclose(values[:, upper:], truth[:, upper:], rtol=1e-4)


@pytest.mark.parametrize("solver", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_on_the_host(kind, solver):
    stacks, grids, expected = problem(kind)
    found = cpu.spectra(stacks, grids, solver=solver, max_bytes=2**20)
    check(found, expected, TOLERANCES[solver])
    if solver == "gram":  # where float32 is not accurate enough, the layer is solved again in float64
        check_upper_half(found, expected)


@pytest.mark.parametrize(("coarse", "fine"), [(np.float32, np.float64), (np.complex64, np.complex128)])
def test_layers_with_a_far_spike_are_solved_again_in_float64(monkeypatch, coarse, fine):
    rng = np.random.default_rng(0)
    bulk = rng.standard_normal((1, 50, 50)).astype(coarse)
    bulk += (coarse(1j) if np.iscomplexobj(bulk) else 0) * rng.standard_normal((1, 50, 50)).astype(np.float32)
    spike = 3000 * np.outer(rng.standard_normal(50), rng.standard_normal(50)).astype(np.float32)
    grid = make_grid(None, bulk.shape, is_kernel=False)
    precisions = []
    solve = gram_matrices.symmetric_eigenvalues
    monkeypatch.setattr(gram_matrices, "symmetric_eigenvalues", lambda m: precisions.append(m.dtype) or solve(m))
    (plain,) = cpu.spectra([bulk], [grid], solver="gram", max_bytes=2**20)
    assert precisions == [coarse]
    (spiked,) = cpu.spectra([bulk + spike], [grid], solver="gram", max_bytes=2**20)
    assert precisions == [coarse, coarse, fine]
    check_upper_half([plain, spiked], [exact(matrix, grid) for matrix in (bulk, bulk + spike)])


def batched(stacks, grids, *, solver="svd", max_bytes=2**30):
    arrays = [jnp.asarray(stack) for stack in stacks]
    values = accelerator.window_spectra(arrays, tuple(grids), solver=solver, max_bytes=max_bytes)
    return [jnp.sort(grid.pool(flat), axis=-1) for flat, grid in zip(values, grids, strict=True)]


@pytest.mark.parametrize(
    ("kind", "solver", "layers"),
    [
        ("complex normal", "gram", [0, 5]),  # complex and real; every shape of window compiles for two seconds
        pytest.param("heavy", "gram", range(5), marks=pytest.mark.slow),
        ("complex heavy", "svd", range(6)),
    ],
)
def test_errors_in_batches(kind, solver, layers):
    stacks, grids, expected = ([part[i] for i in layers] for part in problem(kind))
    found = batched(stacks, grids, solver=solver)
    check(found, expected, TOLERANCES[solver])
    if kind == "complex normal":
        check_upper_half(found, expected)


def test_small_batches_change_nothing():
    stacks, grids, _ = problem("normal")
    whole, small = batched(stacks, grids), batched(stacks, grids, max_bytes=1)
    host = [cpu.spectra(stacks, grids, solver="gram64", max_bytes=size) for size in (1, 2**30)]
    for a, b, c, d in zip(whole, small, *host, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_allclose(c, d, rtol=1e-10)  # products are shared where memory allows it


@pytest.mark.parametrize(("dtype", "solver"), [(np.float32, "gram"), (np.complex64, "gram64")])
def test_window_memory_is_bounded(dtype, solver):
    stack = np.zeros((1, 600, 600), dtype)
    grid = make_grid(Window(rows=100, per_axis=20), stack.shape, is_kernel=False)  # 400 windows: 16 MB in float32
    layer = cpu._layer(stack, grid, solver, 10**6)._replace(runs=[])
    size = np.dtype(dtype).itemsize * (2 if solver == "gram64" else 1)
    largest = max((task.last - task.first) * size * 2 * 100 * 100 for task in cpu._tasks([layer], 2, 10**6))
    assert 10**6 / 2 < largest <= 10**6


@pytest.mark.parametrize(("windows", "rows", "threads"), [(1, 1024, 4), (2, 1024, 2), (9, 1024, 1), (1, 64, 1)])
def test_cores_without_a_large_window_go_to_blas(windows, rows, threads, monkeypatch):
    given = []

    class Blas:
        @contextlib.contextmanager
        def limit(self, *, limits, user_api):
            given.append((limits, user_api))
            yield

    monkeypatch.setattr(cpu, "_blas", Blas)
    monkeypatch.setattr(cpu, "cores", lambda: 4)
    monkeypatch.setattr(cpu, "_in_threads", lambda workers, function, *arguments: None)
    stack = np.zeros((windows, rows, rows), np.float32)
    grid = make_grid(None, stack.shape, is_kernel=False)
    cpu.solve([stack], [grid], solver="gram", max_bytes=2**30)
    assert given == [(threads, "blas")]


@pytest.mark.parametrize("rows", [1, 2, 25, 26, 97])
def test_two_stages_find_all_eigenvalues(rows):
    rng = np.random.default_rng(rows)
    heavy, low = rng.standard_t(1.5, (rows, rows)), rng.standard_normal((rows, 1))
    matrices = np.stack([heavy + heavy.T, heavy @ heavy.T, low @ low.T, np.diag(rng.random(rows))])
    expected = np.linalg.eigvalsh(matrices)
    matrices[:, *np.tril_indices(rows, -1)] = np.nan  # only the upper triangles are read
    found = two_stage.symmetric_eigenvalues(matrices)
    assert found.dtype == np.float64
    np.testing.assert_array_less(np.abs(found - expected).max(-1), 1e-13 * np.abs(expected).max(-1))


@pytest.mark.parametrize(
    ("solver", "dtype", "matrices", "taken"),
    [
        ("gram64", np.float32, 3, True),
        ("gram64", np.float32, 1, False),  # BLAS has both cores
        ("gram64", np.complex64, 3, False),
        ("gram", np.float32, 3, False),
    ],
)
def test_large_windows_are_solved_in_two_stages(solver, dtype, matrices, taken, monkeypatch):
    counts, solve = [], two_stage.symmetric_eigenvalues
    monkeypatch.setattr(two_stage, "symmetric_eigenvalues", lambda m: counts.append(len(m)) or solve(m))
    monkeypatch.setattr(two_stage, "_FROM_ROWS", 70)
    monkeypatch.setattr(cpu, "_LARGE", 70)
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((matrices, 70, 90)).astype(dtype)
    for window in (None, Window(rows=70, stride=10)) if matrices > 1 else (None,):
        grid = make_grid(window, stack.shape, is_kernel=False)
        (found,) = cpu.spectra([stack], [grid], solver=solver, max_bytes=2**30)
        check_upper_half([found], [exact(stack, grid)])
    small = np.ones((3, 69, 90), dtype)
    cpu.spectra([small], [make_grid(None, small.shape, is_kernel=False)], solver=solver, max_bytes=2**30)
    assert sum(counts) == (3 + 9 if taken else 0)


def test_the_solver_is_chosen_by_platform_and_by_what_the_fit_needs():
    def chosen(solver, exact, platform="gpu"):
        return dispatch.choose_solver(solver, platform=platform, exact=exact)

    assert [chosen("auto", False), chosen("auto", True), chosen("gram", True)] == ["gram", "svd", "gram"]
    assert [chosen("auto", True, "cpu"), chosen("gram64", False, "cpu")] == ["gram64", "gram64"]
    with pytest.raises(ValueError, match="needs jax_enable_x64"):
        dispatch.check_solver("gram64", "gpu")
    dispatch.check_solver("gram64", "cpu")


def test_an_accelerator_solves_the_weights_of_a_network():
    weights = [np.random.default_rng(0).standard_normal((6, cols)).astype(np.float32) for cols in (6, 8)]
    grids = [make_grid(None, (1, *weight.T.shape), is_kernel=False) for weight in weights]
    # One window at a time: on CPU batches may wait forever.
    cuts = [dispatch.Cut(FLAX_AXES.of(2), grid) for grid in grids]
    found = dispatch.pooled_eigenvalues(weights, cuts, dispatch.Options("gpu", "svd", False, 1))
    for spectra, weight in zip(found, weights, strict=True):
        np.testing.assert_allclose(spectra.values[0, 0], np.linalg.svd(weight, compute_uv=False)[::-1] ** 2, rtol=1e-4)


def test_nan_gives_zeros_in_its_own_layer_only():
    stacks, grids, _ = problem("normal")
    broken = [np.where(stacks[0] > 1, np.nan, stacks[0]), *stacks[1:]]
    clean = batched(stacks, grids)
    for found in (batched(broken, grids), cpu.spectra(broken, grids, solver="svd", max_bytes=2**20)):
        np.testing.assert_array_equal(found[0], 0)
        for values, expected in zip(found[1:], clean[1:], strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-4)


GRIDS = {  # (R, C), window: what the windows differ in, and how many share a product
    "rows": ((90, 60), Window(rows=40, aspect_ratio=1.5, stride=5)),
    "columns": ((60, 90), Window(rows=60, aspect_ratio=0.5, stride=4)),
    "both": ((80, 80), Window(rows=40, per_axis=9)),
    "one axis": ((50, 120), Window(per_axis=12)),
}


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("name", GRIDS)
def test_windows_that_share_a_product_have_their_own_eigenvalues(name, kind):
    shape, window = GRIDS[name]
    rng = np.random.default_rng(3)
    stack = rng.standard_normal((1, *shape))
    if kind == "complex":
        stack = stack + 1j * rng.standard_normal((1, *shape))
    grid = make_grid(window, stack.shape, is_kernel=False)
    runs = gram_matrices.shared_runs(grid)
    assert sorted(number for run in runs for number in run.windows) == list(range(len(grid.starts)))
    assert max(len(run.windows) for run in runs) > 1
    (found,) = cpu.window_spectra([stack], [grid], solver="gram64", max_bytes=2**30)
    for (row, col), values in zip(grid.starts, found, strict=True):
        cut = stack[0, row : row + grid.rows, col : col + grid.cols]
        np.testing.assert_allclose(values, np.linalg.svd(cut, compute_uv=False)[::-1] ** 2, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 9)])
@pytest.mark.parametrize("char", "fdFD")
def test_products_of_any_view(shape, char):
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((2, 20, 30)) + 1j * rng.standard_normal((2, 20, 30))
    whole = (whole if char in "FD" else whole.real).astype(char)
    rows, cols = shape
    for view in (
        whole[:, :rows, :cols],
        whole[:, 3 : 3 + rows, 2 : 2 + cols].copy(),
        whole.swapaxes(1, 2)[:, :rows, 1 : 1 + cols],
        whole[:, : 2 * rows : 2, : 3 * cols : 3],
    ):
        grams = np.ones((2, rows, rows), char)
        add_products(grams, view)
        expected = 1 + view @ view.swapaxes(1, 2).conj()
        upper = np.triu_indices(rows)
        np.testing.assert_allclose(grams[:, *upper], expected[:, *upper], rtol=1e-5, atol=1e-5)


def test_windows_side_by_side_share_nothing():
    assert not gram_matrices.shared_runs(make_grid(Window(rows=20, stride=20), (1, 80, 80), is_kernel=False))
    assert not gram_matrices.shared_runs(make_grid(Window(), (9, 64, 128), is_kernel=True))
    assert not gram_matrices.shared_runs(make_grid(None, (1, 80, 80), is_kernel=False))
