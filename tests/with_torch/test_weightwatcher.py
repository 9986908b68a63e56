"""Our whole-matrix columns equal those of the installed WeightWatcher, layer by layer."""

import logging

import numpy as np
import pandas as pd
import powerlaw
import pytest
import torch
import weightwatcher
from weightwatcher.WW_powerlaw import WWFit

from farms_jax import TORCH_AXES
from farms_jax.diagnosis.alternatives import compare_alternatives, fit_truncated
from farms_jax.diagnosis.columns import COLUMNS
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import shuffled_measures
from farms_jax.diagnosis.summary import WEIGHTWATCHER, of_model
from farms_jax.diagnosis.weightwatcher import fit_noise, fit_power_law, without_fingers

_SHUFFLED = {"rand_distance", "max_rand_eval", "ww_softrank", "rand_num_spikes"}  # but for the draw
THEIRS = {column.name: column.weightwatcher for column in COLUMNS if column.weightwatcher}
EQUAL = set(THEIRS) - _SHUFFLED - {"ww_num_fingers", "tpl_lambda"}  # of other fits of WeightWatcher


RNG = np.random.default_rng(0)
WEIGHTS = {
    "wide": RNG.standard_normal((40, 100)),
    "tall": RNG.standard_normal((120, 50)),
    "square": RNG.standard_normal((64, 64)),
    "low_rank": RNG.standard_normal((60, 30)) @ RNG.standard_normal((30, 90)),
    "heavy": RNG.standard_t(2, (100, 140)),
    "spiked": RNG.standard_normal((50, 60)) + 5 * np.outer(RNG.standard_normal(50), np.ones(60)),
    "head": RNG.standard_normal((10, 64)),
    "small": 1e-3 * RNG.standard_normal((40, 40)),  # most eigenvalues are above 1e-5, some are not
    "kernel": 0.1 * RNG.standard_normal((48, 24, 3, 3)),
    "wide_kernel": 0.1 * RNG.standard_normal((16, 40, 3, 3)),
    "pointwise": RNG.standard_normal((60, 30, 1, 1)),
}
WEIGHTS = {name: weight.astype(np.float32) for name, weight in WEIGHTS.items()}
FITTED = ("wide", "square", "heavy", "spiked", "kernel")  # WeightWatcher takes a second for each fit of noise


def module_of(weight):
    rows, cols, *size = weight.shape
    module = torch.nn.Conv2d(cols, rows, size, bias=False) if size else torch.nn.Linear(cols, rows, bias=False)
    module.weight.data = torch.tensor(weight)
    return module


def watcher_of(weights):
    model = torch.nn.Sequential(*map(module_of, weights.values()))
    return weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)


def eigenvalues_of(weight):
    singular = np.linalg.svd(np.moveaxis(weight.astype(float), (0, 1), (-2, -1)), compute_uv=False)
    return np.sort(singular.ravel() ** 2) * (0.5 if weight.ndim == 4 else 1)


@pytest.fixture(scope="module")
def analysed():
    """WeightWatcher's rows, and the eigenvalues of its shuffles, by layer: of five together and of one."""
    np.random.seed(0)  # noqa: NPY002 - where WeightWatcher's shuffles come from
    rows = watcher_of(WEIGHTS).analyze(detX=True).to_dict("records")
    theirs = dict(zip(WEIGHTS, rows, strict=True))
    watcher = watcher_of({name: WEIGHTS[name] for name in FITTED})
    solve, shuffled = watcher.random_eigenvalues, []

    def recorded(*args):
        shuffled.append(solve(*args))
        return shuffled[-1]

    watcher.random_eigenvalues = recorded
    rows = watcher.analyze(randomize=True, mp_fit=True).to_dict("records")
    for name, row in zip(FITTED, rows, strict=True):
        theirs[name] |= row
    pairs = [tuple(map(np.sort, shuffled[i : i + 2])) for i in range(0, len(shuffled), 2)]
    return theirs, dict(zip(FITTED, pairs, strict=True))


@pytest.fixture(scope="module")
def both(analysed):
    """Rows of ours and WeightWatcher's, by layer."""
    theirs, _ = analysed
    ours = measure(WEIGHTS, TORCH_AXES, Settings(resamples=0))
    return {name: (ours[name].row, theirs[name]) for name in WEIGHTS}


@pytest.mark.parametrize("name", WEIGHTS)
def test_columns_are_equal(both, name):
    ours, theirs = both[name]
    theirs = theirs | {"N": max(theirs["N"], theirs["M"]), "M": min(theirs["N"], theirs["M"])}
    theirs["Q"] = theirs["N"] / theirs["M"]
    assert len(EQUAL) == 28
    for column in EQUAL if name in FITTED else EQUAL - {"ww_num_spikes", "ww_mp_softrank"}:
        least = 1e-12 * ours["sv_max"] if column == "sv_min" else 0
        np.testing.assert_allclose(ours[column], theirs[THEIRS[column]], rtol=1e-5, atol=least, err_msg=column)


def test_the_summary_is_theirs(analysed, both):
    fitted = [both[name] for name in FITTED]
    theirs = weightwatcher.WeightWatcher.get_summary(watcher_of({}), pd.DataFrame([row for _, row in fitted]))
    ours = of_model([row for row, _ in fitted])
    assert set(theirs) == {THEIRS[name] for name in WEIGHTWATCHER}
    for name in WEIGHTWATCHER:
        np.testing.assert_allclose(ours[name], theirs[THEIRS[name]], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", FITTED)
def test_a_shuffle_of_theirs_gives_their_columns(analysed, name):
    theirs, shuffled = analysed
    eigenvalues, (five, one) = eigenvalues_of(WEIGHTS[name]), shuffled[name]
    ours = shuffled_measures(eigenvalues, one, *WEIGHTS[name].shape[:2])
    for column in ("rand_distance", "ww_softrank"):
        np.testing.assert_allclose(ours[column], theirs[name][column], rtol=1e-4, err_msg=column)
    shorter, longer = sorted(WEIGHTS[name].shape[:2])
    noise = fit_noise(five, longer / shorter, shorter)
    assert noise.num_spikes == theirs[name]["rand_num_spikes"]
    np.testing.assert_allclose(noise.softrank, theirs[name]["rand_mp_softrank"], rtol=1e-5)
    assert noise.num_spikes > 0 or name != "heavy"


@pytest.mark.parametrize("name", [name for name in FITTED if name != "heavy"])  # where a few entries decide
def test_shuffled_columns_agree_but_for_the_draw(both, name):
    ours, theirs = both[name]
    np.testing.assert_allclose(ours["max_rand_eval"], theirs["max_rand_eval"], rtol=0.25)
    np.testing.assert_allclose(ours["ww_softrank"], theirs["ww_softrank"], rtol=0.25)
    np.testing.assert_allclose(ours["rand_distance"], theirs["rand_distance"], rtol=0.3, atol=0.02)


@pytest.mark.filterwarnings("ignore:No valid values:UserWarning", "ignore:Fitted parameters:UserWarning")
@pytest.mark.parametrize("name", ["spiked", "heavy"])  # of others, two thresholds are as good to its search
def test_tails_are_those_of_powerlaw(name):
    eigenvalues = eigenvalues_of(WEIGHTS[name][:50] / 5)
    truncated = powerlaw.Fit(eigenvalues, xmin_distribution="truncated_power_law", verbose=False)
    theirs = truncated.truncated_power_law
    alpha, rate, distance, xmin = fit_truncated(eigenvalues)
    np.testing.assert_allclose(xmin, truncated.xmin)
    np.testing.assert_allclose((alpha, distance), (theirs.alpha, truncated.D), rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(rate, theirs.Lambda, rtol=0.01, atol=1e-4)
    ours, whole = compare_alternatives(eigenvalues, fit_power_law(eigenvalues)), WWFit(eigenvalues)
    for law, other in (("exponential", "exponential"), ("truncated", "truncated_power_law")):
        expected = whole.distribution_compare("power_law", other)
        np.testing.assert_allclose(ours[law], expected, rtol=0.01, atol=1e-3, err_msg=law)


def test_fingers_are_theirs():
    rows = watcher_of(WEIGHTS).analyze(fix_fingers="clip_xmax").to_dict("records")
    assert len({row["num_fingers"] for row in rows}) > 1
    for weight, row in zip(WEIGHTS.values(), rows, strict=True):
        raw = fit_power_law(eigenvalues_of(weight))
        clipped = without_fingers(eigenvalues_of(weight), raw)
        if clipped is None:
            assert row["alpha"] == -1
        else:
            np.testing.assert_allclose((clipped[0].alpha, clipped[1]), (row["alpha"], row["num_fingers"]), rtol=1e-6)
            np.testing.assert_allclose(raw.alpha, row["raw_alpha"], rtol=1e-6)
