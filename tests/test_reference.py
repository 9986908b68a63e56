"""Alphas against the numbers of the public PyTorch code: fixtures `alpha_linear` and `alpha_conv`."""

import contextlib

import jax
import numpy as np
import oracle
import pytest
from helpers import ALPHA_RTOL, few, load_cases, tail_of, window_of
from weights import weight

import farms_jax
from farms_jax._axes import TORCH_AXES
from farms_jax._windows import make_grid

LINEAR, LINEAR_NUMBERS = load_cases("alpha_linear")
CONV, CONV_NUMBERS = load_cases("alpha_conv")
REFERENCE_NAMES = {"spectral_norm": "largest_eigenvalue", "norm": "norm", "stable_rank": "stable_rank"}


def settings_of(case):
    return window_of(case), tail_of(case), case.get("conv_norm", 0.5)


def grouped(cases):
    """Cases by settings: each group is one analysis of all its weights."""
    groups = {}
    for case in cases:
        groups.setdefault(settings_of(case), []).append(case)
    return groups


def analyses(cases):
    """Parameters of a test: settings with a few weights each, and in float64 with all, which is slow."""
    some = [(*group, ("float64", "float32")[n % 2]) for n, group in enumerate(grouped(cases[::12]).items())]
    return [*some, *(pytest.param(*group, "float64", marks=pytest.mark.slow) for group in grouped(cases).items())]


def same_windows(case):
    """Whether the reference cut the windows that we cut; where they exceed the matrix it slices from the end."""
    if not case["use_sliding_window"]:
        return True
    rows, cols = weight(case["matrix"]).shape
    grid = make_grid(window_of(case), (1, rows, cols), is_kernel=False)
    ours = [sorted({start[axis] for start in grid.starts})[:12] for axis in (0, 1)]
    return [grid.rows, grid.cols] == case["window_shape"] and ours == [case["row_starts"], case["col_starts"]]


def comparable(case):
    """The number is well defined, and from the windows that we cut."""
    return case["status"] == "ok" and case.get("well_conditioned", False) and case["variant"] != "alphapruning"


# Windows without full rank: the reference's histogram starts at the rounding noise of the zero eigenvalues.
RANK_NOISE = {("zeroblock_40x200", 100), ("rankdef_120x90", 32)}


def on_noise(case):
    return case["fit"] == "xmin_peak" and (case["matrix"], case["num_row_samples"]) in RANK_NOISE


LINEAR_SAME = [case for case in LINEAR if comparable(case) and same_windows(case) and not on_noise(case)]
LINEAR_OURS = [case for case in LINEAR if comparable(case) and (on_noise(case) or not same_windows(case))]
# The reference takes a kernel with out + in < kh + kw for channels-first and cuts (kh, kw) matrices.
CHANNELS_FIRST = {"conv_4x4x7x7"}
CONV_SAME = [
    case
    for case in CONV
    if case["status"] == "ok"
    and case["well_conditioned"]
    and not (case["use_sliding_window"] and case["tensor"] in CHANNELS_FIRST)
]


def check(cases, numbers, key, settings, precision):
    window, tail, kernel_scale = settings
    x64 = precision == "float64"
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        report = farms_jax.analyze(
            {case[key]: weight(case[key]) for case in cases},
            window=window,
            tail=tail,
            axes=TORCH_AXES,
            kernel_scale=kernel_scale,
        )
    found = report.to_dict()
    suffix = "_f64" if x64 else ""
    for case in cases:
        row, number = found[case[key]], case["case"]
        np.testing.assert_allclose(
            row["alpha"], numbers["alpha" + suffix][number], rtol=ALPHA_RTOL[x64], err_msg=f"case {number}"
        )
        np.testing.assert_allclose(row["ks_distance"], numbers["D" + suffix][number], atol=1e-4)
        assert row["num_eigenvalues"] == (case["n_eigs"] if "n_eigs" in case else numbers["n_eigs"][number])
        for theirs, ours in REFERENCE_NAMES.items():
            np.testing.assert_allclose(
                row[ours], numbers[theirs][number], rtol=1e-4, err_msg=f"{ours} of case {number}"
            )
        np.testing.assert_allclose(row["alpha_hat"], numbers["alpha_hat"][number], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("settings", "cases", "precision"), analyses(LINEAR_SAME))
def test_matrix(settings, cases, precision):
    check(cases, LINEAR_NUMBERS, "matrix", settings, precision)


@pytest.mark.parametrize(("settings", "cases", "precision"), analyses(CONV_SAME))
def test_kernel(settings, cases, precision):
    check(cases, CONV_NUMBERS, "tensor", settings, precision)


@pytest.mark.parametrize("case", few(LINEAR_OURS, 9), ids=lambda case: f"{case['case']}-{case['matrix']}")
def test_matrix_where_we_differ(case):
    """The reference's window is larger than the matrix, or its histogram rests on rounding: both answers."""
    window, tail, _ = settings_of(case)
    matrix = weight(case["matrix"])
    ours = farms_jax.analyze({"m": matrix}, window=window, tail=tail, axes=TORCH_AXES).alpha[0]
    grid = make_grid(window, (1, *matrix.shape), is_kernel=False)
    rows, cols = case["window_shape"]
    theirs_cut = [matrix[i : i + rows, j : j + cols] for i in case["row_starts"] for j in case["col_starts"]]
    ours_cut = [matrix[i : i + grid.rows, j : j + grid.cols] for i, j in grid.starts]
    np.testing.assert_allclose(ours, oracle_alpha(ours_cut, tail), rtol=1e-3)
    if not on_noise(case) and len(theirs_cut) == case["n_windows"]:
        theirs = LINEAR_NUMBERS["alpha_f64"][case["case"]]
        np.testing.assert_allclose(theirs, oracle_alpha(theirs_cut, tail), rtol=1e-5)


def oracle_alpha(windows, tail):
    values = oracle.eigenvalues(windows)
    return oracle.tail(values, tail.xmin, tail.xmin_pos, tail.bins, tail.min_eigenvalue)[0]


CONV_GUESSED = [case for case in CONV if case["tensor"] in CHANNELS_FIRST and case["use_sliding_window"]]


@pytest.mark.parametrize("case", few(CONV_GUESSED, 4), ids=lambda case: str(case["case"]))
def test_channels_first_is_not_guessed(case):
    """The reference takes 4 + 4 < 7 + 7 for channels first; here the axes say so: both answers."""
    window, tail, kernel_scale = settings_of(case)
    settings = {"window": window, "tail": tail, "kernel_scale": kernel_scale}
    kernel = weight(case["tensor"])
    as_guessed = farms_jax.analyze({"k": kernel}, axes=farms_jax.Axes(rows=2, cols=3), **settings)
    np.testing.assert_allclose(as_guessed.alpha[0], CONV_NUMBERS["alpha"][case["case"]], rtol=1e-3)
    declared = farms_jax.analyze({"k": kernel}, axes=TORCH_AXES, **settings)
    grid = make_grid(window, TORCH_AXES.of(4).matrices_shape(kernel.shape)[1:], is_kernel=True)
    matrices = kernel.transpose(2, 3, 0, 1).reshape(-1, 4, 4)[:, : grid.rows, : grid.cols]
    np.testing.assert_allclose(declared.alpha[0], oracle_alpha(matrices * np.sqrt(kernel_scale), tail), rtol=1e-3)
