"""Measures of layers: equal to `analyze`, to known spectra, and to themselves whatever they are measured with."""

import dataclasses

import numpy as np
import pytest
from helpers import few

import farms_jax
from farms_jax import FLAX_AXES, TORCH_AXES, Tail, Window
from farms_jax._report import METRICS
from farms_jax._windows import make_grid
from farms_jax.diagnosis import measure as module
from farms_jax.diagnosis.columns import BY_NAME, MEDIAN
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import bulk_measures, spectrum_measures
from farms_jax.solvers import cpu, dispatch, gram_matrices

RNG = np.random.default_rng(0)
WEIGHTS = {
    "wide": RNG.standard_normal((32, 100)).astype(np.float32),
    "square": RNG.standard_normal((60, 60)),
    "kernel": 0.1 * RNG.standard_normal((40, 16, 3, 3)).astype(np.float32),
    "heavy": RNG.standard_t(2, (50, 30)).astype(np.float16),
    "low rank": (RNG.standard_normal((32, 6)) @ RNG.standard_normal((6, 70))).astype(np.float32),
}
QUICK = Settings(resamples=0, randomize=False)
SETTINGS = {
    "default": {},
    "ks": {"tail": Tail("ks")},
    "grid": {"window": Window(rows=16, per_axis=3), "tail": Tail(xmin_pos=4.0), "kernel_scale": 1.0},
    "pooled": {"window": Window(aspect_ratio=0.5, divisions="pooled")},
}


@pytest.fixture(scope="module")
def measured():
    return measure(WEIGHTS, TORCH_AXES, Settings(resamples=20, alternatives=True, bootstrap=4))


@pytest.mark.parametrize("kind", few(SETTINGS, 4))
def test_names_of_a_report_have_its_numbers(kind):
    settings = dataclasses.replace(QUICK, **SETTINGS[kind])
    found = measure(WEIGHTS, TORCH_AXES, settings)
    options = {"axes": TORCH_AXES, "tail": settings.tail, "kernel_scale": settings.kernel_scale}
    windows = farms_jax.analyze(WEIGHTS, window=settings.window, **options)
    whole = farms_jax.analyze(WEIGHTS, window=None, **options)
    assert list(found) == list(WEIGHTS)
    for i, name in enumerate(windows.names):
        row = found[name].row
        for prefix, report in (("", windows), ("whole_", whole)):
            for metric in {metric for metric in METRICS if prefix + metric in row}:
                expected = getattr(report, metric)[i]
                np.testing.assert_allclose(row[prefix + metric], expected, rtol=2e-5, err_msg=(name, metric))
        assert abs(row["aspect_ratio_bias"] - (row["whole_alpha"] - row["alpha"])) < 1e-12


def test_fits_of_a_diagnosis_are_in_float64():
    row = measure({"square": WEIGHTS["square"]}, TORCH_AXES, QUICK)["square"].row
    eigenvalues = np.linalg.svd(WEIGHTS["square"], compute_uv=False)[::-1] ** 2
    logs = np.log(eigenvalues[30:] / eigenvalues[30])
    assert row["whole_alpha"] == pytest.approx(1 + 30 / logs.sum(), rel=1e-12)


def test_every_column_is_there_and_ready_for_json(measured):
    of_the_network = {
        "layer",
        "type",
        "place",
        "status",
        "reason",
        "ww_status",
        "rank",
        "rank_low",
        "rank_high",
        "rank_flips",
    }
    for name, found in measured.items():
        assert set(found.row) == set(BY_NAME) - of_the_network - set(MEDIAN.values()), name
        assert all(type(value) in {int, float, str, type(None)} for value in found.row.values()), name
        assert found.deviations.shape == (20,)
        low, high = found.row["alpha_low"], found.row["alpha_high"]
        assert 1 <= low <= found.row["alpha"] <= high
    kernel = measured["kernel"].row
    assert (kernel["shape"], kernel["M"], kernel["N"], kernel["num_windows"]) == ("40x16x3x3", 16, 40, 18)
    assert (kernel["whole_num_eigenvalues"], kernel["num_params"]) == (144, 40 * 16 * 9)


def test_measures_of_a_known_spectrum():
    rng = np.random.default_rng(3)
    left, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    right, _ = np.linalg.qr(rng.standard_normal((50, 30)))
    singular = np.concatenate([np.linspace(4, 1, 24), [1e-4, 1e-6, 1e-9, 1e-12, 0, 0]])
    weight = left * singular @ right.T
    (found,) = measure({"a": weight}, TORCH_AXES, QUICK).values()
    row, norm = found.row, (singular**2).sum()
    assert (row["matrix_rank"], row["rank_loss"], row["weak_rank_loss"]) == (28, 2, 6)
    numbers = [row[name] for name in ("whole_norm", "whole_largest_eigenvalue", "sv_max", "whole_stable_rank")]
    np.testing.assert_allclose(numbers, [norm, 16, 4, norm / 16], rtol=1e-12)
    shares = singular[:28] / singular.sum()
    np.testing.assert_allclose(row["effective_rank"], np.exp(-(shares * np.log(shares)).sum()), rtol=1e-9)
    powers = (singular[singular > 0] ** (2 * row["ww_alpha"])).sum()
    np.testing.assert_allclose(row["ww_log_alpha_norm"], np.log10(powers), rtol=1e-9)
    assert row["sv_min"] < 1e-13
    nearly = WEIGHTS["square"].astype(np.float32)
    nearly[0] *= 1e-5  # its smallest singular value is beyond a Gram matrix
    (found,) = measure({"a": nearly}, TORCH_AXES, QUICK).values()
    smallest = np.linalg.svd(nearly.astype(np.float64), compute_uv=False)[-1]
    np.testing.assert_allclose(found.row["sv_min"], smallest, rtol=1e-5)


def test_layers_of_zeros_or_few_eigenvalues():
    found = measure({"zero": np.zeros((20, 30), np.float32)}, TORCH_AXES, Settings(resamples=5))["zero"]
    alphas = ("alpha", "alpha_low", "whole_alpha", "ww_alpha")
    assert not any(found.row[name] for name in (*alphas, "whole_log_norm", "whole_stable_rank", "ww_softrank"))
    assert (found.row["whole_norm"], found.row["matrix_rank"], found.row["weak_rank_loss"]) == (0, 0, 20)
    assert not found.deviations.any()
    for count in (1, 2, 5):  # too few eigenvalues, and just enough
        row = spectrum_measures(np.arange(1.0, count + 1)[None], count, 7)
        assert (row["whole_num_eigenvalues"], row["ww_alpha"] is None) == (count, count == 1)


def test_a_layer_does_not_depend_on_the_others_and_weights_stay(measured):
    together, weights = measured["heavy"], {"heavy": WEIGHTS["heavy"].copy()}
    settings = Settings(resamples=20, max_batch_bytes=1, alternatives=True, bootstrap=4)
    alone = measure(weights, TORCH_AXES, settings)["heavy"]
    np.testing.assert_array_equal(weights["heavy"], WEIGHTS["heavy"])
    assert (alone.row.pop("shape"), alone.row.pop("structure")) == ("50x30", together.row["structure"])
    assert alone.row == pytest.approx({name: together.row[name] for name in alone.row}, rel=1e-4)
    np.testing.assert_allclose(alone.deviations, together.deviations, rtol=1e-3, atol=1e-6)
    other = measure(weights, TORCH_AXES, Settings(resamples=20, seed=1))["heavy"]
    assert not np.array_equal(other.deviations, alone.deviations)
    assert other.row["max_rand_eval"] != alone.row["max_rand_eval"]


def test_transposed_axes_give_the_same_layer(measured):
    flax = {name: np.moveaxis(weight, (0, 1), (-1, -2)) for name, weight in WEIGHTS.items()}
    for name, found in measure(flax, FLAX_AXES, QUICK).items():
        assert found.row["ww_alpha"] == measured[name].row["ww_alpha"]
        assert found.row["alpha"] == measured[name].row["alpha"]


def test_shuffling_tells_structure_from_noise():
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((80, 120)).astype(np.float32)
    spiked = noise + np.outer(rng.standard_normal(80), rng.standard_normal(120)).astype(np.float32)
    rows = {name: found.row for name, found in measure({"n": noise, "s": spiked}, TORCH_AXES, Settings()).items()}
    assert rows["n"]["rand_distance"] < 0.03
    assert abs(rows["n"]["ww_softrank"] - 1) < 0.1
    assert (rows["n"]["mp_spikes"], rows["s"]["mp_spikes"]) == (0, 1)
    entry = noise.copy()
    entry[3, 4] = 80  # stays when entries are shuffled, as a direction does not
    rows |= {"e": measure({"e": entry}, TORCH_AXES, Settings())["e"].row}
    assert [(row["mp_spikes"], row["mp_rand_spikes"]) for row in rows.values()] == [(0, 0), (1, 0), (1, 1)]
    assert rows["s"]["rand_distance"] > 0.1
    assert rows["s"]["ww_softrank"] < 0.4
    np.testing.assert_allclose([row["mp_sigma"] for row in rows.values()], 1, atol=0.05)


def test_what_a_sparse_layer_shares_with_its_shuffles_is_no_spike():
    rng, shape = np.random.default_rng(0), (32, 48)
    sparse = rng.standard_normal((48, *shape)) * (rng.random((48, *shape)) < 0.1)
    direction = np.full(shape, 0.2)  # an eigenvalue of 61, where the bulk ends at 13
    spectra = [np.linalg.svd(part, compute_uv=False)[:, ::-1] ** 2 for part in (sparse, sparse[:24] + direction)]
    noise, planted = ([bulk_measures(own, shape, shape, spectra[0][24:]) for own in part[:24]] for part in spectra)
    assert sum(row["mp_spikes"] > 0 for row in noise) > 12
    assert sum(row["mp_spikes"] > row["mp_rand_spikes"] for row in noise) <= 1
    assert all(row["mp_spikes"] > row["mp_rand_spikes"] for row in planted)


def test_histograms_hold_the_whole_spectrum(measured):
    for name, found in measured.items():
        edges = np.array(found.histogram.edges)
        width = edges[1] - edges[0]
        for density in (found.histogram.windows, found.histogram.whole):
            assert len(density) == len(edges) - 1
            assert abs(sum(density) * width - 1) < 1e-9, name
        assert abs(10 ** edges[-1] / found.row["whole_largest_eigenvalue"] - 1) < 1e-5


def test_no_windows_are_solved_twice(monkeypatch):
    solved = []

    def count(stacks, grids, **options):
        solved.extend(zip(map(id, stacks), grids, strict=True))
        return dispatch.window_eigenvalues(stacks, grids, **options)

    monkeypatch.setattr(module, "window_eigenvalues", count)
    measure({"a": WEIGHTS["square"], "b": WEIGHTS["kernel"]}, TORCH_AXES, Settings(randomize=False))
    assert len(solved) == len(set(solved)) == 4  # a: whole, halves; b: whole, windows, which serve the interval too


@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_window_by_window_on_host_and_device(solver, monkeypatch):
    monkeypatch.setattr(gram_matrices, "BLOCK_ENTRIES", 1)
    monkeypatch.setattr(gram_matrices, "_MIN_BLOCK", 7)  # a Gram matrix is the sum over several blocks of columns
    stacks = [RNG.standard_normal((2, 20, 31)).astype(np.float32), RNG.standard_normal((1, 12, 12)).astype(np.float32)]
    windows = (Window(rows=8, per_axis=2), None)
    grids = [make_grid(one, stack.shape, is_kernel=False) for one, stack in zip(windows, stacks, strict=True)]
    options = {"solver": solver, "max_bytes": 3000}
    host = dispatch.window_eigenvalues(stacks, grids, platform="cpu", **options)
    device = dispatch.window_eigenvalues(stacks, grids, platform="gpu", **options)
    for stack, grid, ours, theirs in zip(stacks, grids, host, device, strict=True):
        cut = [matrix[i : i + grid.rows, j : j + grid.cols] for matrix in stack for i, j in grid.starts]
        expected = np.linalg.svd(np.array(cut, np.float64), compute_uv=False)[:, ::-1] ** 2
        scale = expected[:, -1:] * (1e-13 if solver == "gram64" else 2e-6)
        assert ours.dtype == theirs.dtype == (np.float64 if solver == "gram64" else np.float32)
        assert (np.abs(ours - expected) < scale).all()
        assert (np.abs(theirs - expected) < scale).all()


def test_a_bound_on_memory_leaves_one_worker(monkeypatch):
    workers = []
    pool = cpu.ThreadPoolExecutor
    monkeypatch.setattr(cpu, "cores", lambda: 4)
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", lambda count: workers.append(count) or pool(count))
    stack, bytes_of_one = np.ones((1, 50, 50), np.float32), 2 * 8 * 50 * 50
    for bound in (1, 2 * bytes_of_one, 100 * bytes_of_one):
        cpu.window_spectra([stack], [make_grid(None, stack.shape, is_kernel=False)], solver="gram64", max_bytes=bound)
    assert workers == [1, 2, 4]
