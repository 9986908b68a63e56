"""Intervals: they hold what they should as often as they should, and follow from the windows alone."""

import numpy as np
import pytest
from helpers import few

from benchmarks.interval_coverage import KINDS, coverage
from farms_jax import TORCH_AXES, Tail, Window
from farms_jax._windows import Grid, make_grid
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.resampling import deviations, interval, interval_grid, rank_flips, separate_windows
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.tail_fits import fit_spectra


@pytest.mark.parametrize(
    ("kind", "shape", "window", "rule"),
    few(
        [
            ("gaussian", (96, 96), Window(), "median"),
            ("student t, 1.5", (32, 128), Window(), "median"),
            ("spiked", (3, 3, 32, 32), Window(), "median"),
            ("gaussian", (7, 7, 3, 32), Window(), "median"),
            ("student t, 1.5", (64, 96), Window(rows=16), "median"),
            ("spiked", (64, 96), Window(rows=16), "median"),
            ("student t, 1.5", (3, 3, 32, 32), Window(), "peak"),
            ("student t, 1.5", (3, 3, 32, 32), Window(), "ks"),
        ],
        2,
    ),
)
def test_intervals_hold_the_mean_of_the_ensemble(kind, shape, window, rule):
    found = coverage(kind, shape, window, draws=80, rule=rule)
    assert found["coverage"] >= 0.82  # 95 % less three deviations of 80 draws and some
    assert 0.7 < found["width"] < 2.5


def test_a_narrower_level_covers_less():
    rng = np.random.default_rng(0)
    weights = {str(i): KINDS["student t, 3"](rng, (24, 48, 3, 3)) for i in range(150)}
    rows = [found.row for found in measure(weights, TORCH_AXES, Settings(whole=False, level=0.5)).values()]
    mean = np.mean([row["alpha"] for row in rows])
    assert 0.35 < np.mean([row["alpha_low"] <= mean <= row["alpha_high"] for row in rows]) < 0.75


def test_windows_of_an_interval():
    square, long = (make_grid(Window(), (1, 64, cols), is_kernel=False) for cols in (64, 1024))
    halves = interval_grid(square, (1, 64, 64))
    assert (halves.rows, halves.cols, len(halves.starts)) == (32, 32, 9)
    assert max(start for start, _ in halves.starts) == 32
    assert interval_grid(long, (1, 64, 1024)) is long
    kernel = make_grid(Window(), (9, 16, 48), is_kernel=True)
    assert interval_grid(kernel, (9, 16, 48)) is kernel
    pointwise = interval_grid(make_grid(Window(), (1, 16, 48), is_kernel=True), (1, 16, 48))
    assert (pointwise.rows, pointwise.transposed) == (8, True)
    assert max(start for start, _ in pointwise.starts) == 40  # down the longer axis, which is turned
    single = make_grid(Window(), (1, 3, 3), is_kernel=False)
    assert interval_grid(single, (1, 3, 3)) is single


def test_worth_of_windows():
    apart = Grid(4, 4, ((0, 0), (4, 0), (0, 4)))
    assert separate_windows(apart) == pytest.approx(3)
    assert separate_windows(Grid(4, 4, ((1, 1),) * 5)) == pytest.approx(1)
    half = Grid(4, 4, ((0, 0), (2, 0)))
    assert separate_windows(half) == pytest.approx(2 / 1.5)
    assert separate_windows(half, power=2) == pytest.approx(2 / 1.25)
    many = Grid(4, 4, tuple((4 * i, 0) for i in range(3000)))
    assert separate_windows(many) == pytest.approx(3000)


def test_deviations_scatter_as_the_mean_of_separate_windows():
    rng = np.random.default_rng(0)
    windows = np.sort(rng.pareto(1.0, (400, 64)) + 1)
    grid = Grid(4, 4, tuple((4 * i, 0) for i in range(400)))
    alphas = np.asarray(fit_spectra(windows, Tail()).alpha)
    found = deviations(windows, Tail(), (grid, grid), 1, 4000, rng)
    assert found.std() == pytest.approx(alphas.std() / 20, rel=0.1)
    assert abs(found.mean()) < 0.1 * found.std()
    low, high = interval(2.0, found, 0.9)
    assert (high - low) / 2 == pytest.approx(1.645 * found.std(), rel=0.1)
    twice = deviations(windows, Tail(), (grid, grid._replace(starts=grid.starts[:100])), 1, 4000, rng)
    assert twice.std() == pytest.approx(2 * found.std(), rel=0.1)
    assert not deviations(np.zeros((9, 8)), Tail(), (grid, grid), 1, 5, rng).any()


def test_adaptive_windows_stop_early_and_agree():
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((96, 128)), "square": np.eye(40) + 0.1}
    # Their windows are too large to differ: they are not adapted.
    large = {"b": rng.standard_normal((30, 60)), "k": np.ones((8, 8, 3, 3)) + np.eye(8)[..., None, None]}
    found = [
        measure(weights | large, TORCH_AXES, Settings(window=Window(rows=16, per_axis=12), whole=False, tolerance=most))
        for most in (None, 0.2, 1e-6)
    ]
    whole, loose, tight = (one["a"].row for one in found)
    assert loose["num_windows"] < 144 == whole["num_windows"] == tight["num_windows"]
    assert (loose["alpha_high"] - loose["alpha_low"]) / 2 <= 0.2
    assert abs(loose["alpha"] - whole["alpha"]) < 0.2
    assert tight["alpha"] == pytest.approx(whole["alpha"], rel=1e-6)
    assert all(one[name].row == found[0][name].row for one in found for name in large)


def test_ranks_and_their_flips():
    alphas = np.array([3.0, 1.5, 2.0, 2.05])
    scatter = np.zeros((4, 100))
    scatter[2, :25] = 0.2  # in a quarter of the draws the third layer passes the fourth
    rank, low, high, flips = rank_flips(alphas, scatter, 0.9)
    assert rank.tolist() == [4, 1, 2, 3]
    assert low.tolist() == [4, 1, 2, 2]
    assert high.tolist() == [4, 1, 3, 3]
    assert flips.tolist() == [0, 0, 0.25, 0.25]
    rank, _, _, flips = rank_flips(np.array([None, 2.0, 1.5], object), np.zeros((3, 10)), 0.95)
    assert (rank.tolist(), flips.any()) == ([3, 2, 1], False)  # a layer without a tail is last
