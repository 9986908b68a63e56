"""One status per layer, with its reason: the rules on given measures, and the statuses of layers of known kinds."""

import numpy as np
import pytest

import farms_jax
from farms_jax.diagnosis.status import disagreement_summary, disagreements, status_of, ww_status

BAND = {"noise_alpha": 2.12, "noise_low": 2.08, "noise_high": 2.16, "heavy_alpha": 1.56}
WINDOWS = {"alpha": 1.8, "alpha_low": 1.75, "alpha_high": 1.85, "ks_distance": 0.15, "num_tail": 640, **BAND}
TRAINED = WINDOWS | {"ww_alpha": 3.5, "whole_stable_rank": 4.0, "whole_largest_eigenvalue": 4.0, "mp_spikes": 12}
TRAINED |= {"numerical_rank": 64, "whole_num_eigenvalues": 64, "mp_distance": 0.2, "M": 64}
NEAR = {"alpha": 2.13, "alpha_low": 2.11, "alpha_high": 2.15, "mp_spikes": 0, "mp_distance": 0.01}
WIDE = {"noise_low": 1.3, "noise_high": 4.0, "num_tail": 5}
OF_ANOTHER_RULE = {"median_alpha": 2.13, "median_low": 2.11, "median_high": 2.15}
OF_ANOTHER_RULE |= {"median_ks_distance": 0.15, "median_num_tail": 640, "mp_spikes": 0}


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({}, "well trained", "alpha 1.80 (1.75 to 1.85) is below noise, 2.08 to 2.16; 12 eigenvalues beyond"),
        ({"mp_spikes": 1}, "well trained", "1 eigenvalue beyond"),
        (NEAR, "undertrained", "is that of noise, 2.08 to 2.16; no eigenvalue beyond"),
        (NEAR | {"alpha": 2.05}, "undertrained", "is hardly below noise"),
        (NEAR | {"alpha": 2.2}, "flat", "is above noise, 2.08 to 2.16: its eigenvalues are more equal"),
        (NEAR | {"alpha": 3.0, "ks_distance": 0.05}, "well trained", "is that of a power law, above noise"),
        (NEAR | {"mp_spikes": 2}, "spiked", "is near noise, 2.08 to 2.16, but not all; 2 eigenvalues"),
        (NEAR | {"mp_spikes": 9}, "well trained", "is near noise"),
        (NEAR | {"mp_spikes": 2, "mp_distance": 0.3}, "well trained", "is near noise"),
        (
            NEAR | {"mp_spikes": 2, "mp_rand_spikes": 2},
            "undertrained",
            "is that of noise, 2.08 to 2.16; no eigenvalue beyond the bulk of noise but 2 that its shuffled weights",
        ),
        (
            NEAR | {"mp_spikes": 3, "mp_rand_spikes": 1},
            "spiked",
            "; 2 eigenvalues beyond the bulk of noise, and 1 that",
        ),
        ({"mp_spikes": 12, "mp_rand_spikes": 1}, "well trained", "; 11 eigenvalues beyond"),
        (NEAR | {"alpha": 2.2, "mp_spikes": 2}, "flat", "most of its eigenvalues are more equal; 2"),
        (NEAR | {"alpha": 2.2, "mp_spikes": 9}, "well trained", "a heavy tail, the rest more equal; 9"),
        (NEAR | WIDE, "too few to say", "its tail has 5 eigenvalues, about 14 would do"),
        (NEAR | WIDE | {"alpha": None}, "too few to say", "too few eigenvalues"),
        ({"alpha": 1.5, "alpha_high": 1.55}, "over-correlated", "is below 1.56, that of exponent 2; the largest"),
        ({"alpha": 1.5, "alpha_high": 1.6}, "well trained", "2.08 to 2.16, and not surely below 1.56"),
        ({"alpha": 1.5, "alpha_high": 1.55, "noise_low": 1.4}, "well trained", "is near noise"),
        ({"ww_alpha": 1.6}, "well trained", "below noise"),
        ({"structure": "every weight is zero", "alpha": None}, "degenerate", "every weight is zero"),
        ({"structure": "constant: every weight is 0.5"}, "degenerate", "constant: every weight is 0.5"),
        ({"numerical_rank": 1}, "degenerate", "rank one"),
        ({"numerical_rank": 8}, "degenerate", "low rank: 8 of 64"),
        ({"numerical_rank": 60}, "well trained", "below"),
        ({"dead": 0.25, "structure": "16 of 64 outputs are zero"}, "degenerate", "16 of 64 outputs are zero"),
        ({"dead": 0.05, "structure": "3 of 64 outputs are zero"}, "well trained", "; 3 of 64 outputs are zero"),
        ({"alpha": None, "structure": "orthogonal: all"}, "flat", "orthogonal"),
        ({"alpha": None}, "flat", "nearly equal"),
        (
            {"alpha": 1.5, "alpha_high": 1.52, "noise_alpha": 1.3, "noise_low": 1.2, "noise_high": 1.4},
            "well trained",
            "is above noise, 1.20 to 1.40",
        ),
        (OF_ANOTHER_RULE, "undertrained", "median rule's alpha 2.13 (2.11 to 2.15) is that of noise"),
        ({"alpha": None, "noise_low": None, "whole_num_eigenvalues": 2}, "too few to say", "for a tail: 2"),
    ],
)
def test_status(changes, status, reason):
    found, why = status_of(TRAINED | changes)
    assert found == status
    assert reason in why
    assert ("that of noise" in why) == ("is that of noise" in reason)


def test_without_the_whole_matrix():
    assert status_of(WINDOWS) == ("well trained", "alpha 1.80 (1.75 to 1.85) is below noise, 2.08 to 2.16")


def test_disagreements_with_weightwatcher():
    rows = [
        {"layer": "a", "ww_alpha": 9.0, "status": "well trained"},
        {"layer": "b", "ww_alpha": 16.0, "status": "well trained"},
        {"layer": "c", "ww_alpha": 9.0, "status": "undertrained"},
        {"layer": "d", "ww_alpha": 3.0, "status": "over-correlated"},
        {"layer": "e", "ww_alpha": 1.9, "status": "degenerate"},
        {"layer": "f", "ww_alpha": None, "status": "well trained"},
    ]
    whole = {"Q": 4.0, "ww_num_tail": 8, "whole_num_eigenvalues": 64, "alpha": 1.8, "reason": "why"}
    rows = [whole | row | {"ww_status": ww_status(row)} for row in rows]
    assert [row["ww_status"] for row in rows] == [*["under-trained"] * 3, "good", "over-trained", None]
    found = disagreements(rows)
    assert [row["layer"] for row, _ in found] == ["b", "a", "d"]
    assert found[0][1].startswith("ww_alpha 16.00 fits the 8 largest of 64 eigenvalues of a matrix of aspect ratio 4.0")
    assert disagreement_summary(rows) == [
        "of 3 layers that WeightWatcher calls under-trained, FARMS calls 2 well trained, 1 undertrained",
        "of 1 layer that WeightWatcher calls good, FARMS calls 1 over-correlated",
    ]


def _layers():
    """Yield (name, expected status, words of the reason, weight) in Torch's layout."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    square, _ = np.linalg.qr(normal((128, 128)))
    power = (square * (1 - rng.random(128)) ** (-1 / 3)) @ np.linalg.qr(normal((128, 128)))[0]  # exponent 2.5
    pruned, dead = normal((128, 128)), normal((128, 128))
    groups = pruned.reshape(-1, 4)
    np.put_along_axis(groups, np.abs(groups).argsort(1)[:, :2], 0, 1)
    decayed = dead.copy()
    dead[:20], decayed[:20] = 0, 1e-6 * dead[:20]
    yield "normal", "undertrained", "that of noise", normal((128, 128))
    yield "uniform", "undertrained", "that of noise", rng.uniform(-1, 1, (128, 512))
    yield "cauchy", "undertrained", "heavy-tailed", rng.standard_cauchy((128, 128))
    yield "2:4", "undertrained", "50% of its weights are zero (2:4)", pruned
    yield "kernel", "undertrained", "that of noise", normal((64, 3, 7, 7))
    yield "depthwise", "undertrained", "that of noise", rng.uniform(-1, 1, (96, 1, 3, 3))
    blurs = 0.3 * rng.uniform(-1, 1, (96, 1, 3, 3)) + rng.choice([-1, 1], (96, 1, 1, 1))
    yield "blurs", "spiked", "1 eigenvalue beyond", blurs
    yield "one output", "too few to say", "too few eigenvalues for a tail: 1", normal((1, 64))
    yield "two weights", "degenerate", "62 of 64 inputs are zero", np.eye(1, 64) + np.eye(1, 64, 63)
    yield "decayed", "degenerate", "20 of 128 outputs are zero, or 1000 times smaller", decayed
    yield "tiny", "too few to say", "would do", normal((5, 5))
    yield "mean of all", "spiked", "its weights share a mean of 0.5", 0.5 + normal((128, 128))
    centre = normal((64, 32, 3, 3))
    centre[..., 1, 1] += 0.4
    yield "mean of the centre", "spiked", "share a mean of 0.352 at kernel position 4", centre
    strong = 0.15 + normal((128, 128)) + np.outer(normal(128), normal(128)) / 3
    yield "mean beside more", "spiked", "1 eigenvalue beyond", strong
    yield "residual", "flat", "a multiple of the identity is 9", np.eye(128) + 0.02 * normal((128, 128))
    yield "orthogonal", "flat", "orthogonal: all singular values are equal", 3 * square
    yield "semi-orthogonal", "flat", "orthogonal", square[:64]
    yield "orthogonal kernel", "flat", "orthogonal", square[:64].reshape(64, 32, 2, 2)
    yield "orthogonal depthwise kernel", "flat", "orthogonal", np.linalg.qr(normal((96, 9)))[0].reshape(96, 1, 3, 3)
    yield "identity", "flat", "the identity", np.eye(64)
    yield "permutation", "flat", "a permutation", np.eye(64)[rng.permutation(64)]
    yield "diagonal", "degenerate", "diagonal", np.diag(normal(64))
    yield "constant", "degenerate", "constant: every weight is 0.5", np.full((64, 64), 0.5)
    yield "zero", "degenerate", "every weight is zero", np.zeros((64, 64))
    yield "rank 1", "degenerate", "rank one", np.tile(np.log(np.arange(1, 17)), (128, 1))
    yield "rank 8", "degenerate", "low rank: 8 of 96", normal((96, 8)) @ normal((8, 128))
    yield "repeated", "degenerate", "only 32 of 128 outputs differ", np.repeat(normal((32, 128)), 4, 0)
    yield "dead", "degenerate", "20 of 128 outputs are zero", dead
    for shape in ((128, 4, 3, 3), (128, 64, 3, 3), (64, 3, 7, 7)):
        sparse = normal(shape) * (rng.random(shape) < 0.1)
        yield f"sparse {shape}", "undertrained", "% of its weights are zero", sparse
    yield "power law", "well trained", "a power law, above noise", power


def test_statuses_of_layers_of_known_kinds():
    layers = list(_layers())
    weights = {name: weight.astype(np.float32) for name, _, _, weight in layers}
    rows = {row["layer"]: row for row in farms_jax.diagnose(weights, axes=farms_jax.TORCH_AXES, resamples=20).layers}
    found = {name: rows[name]["status"] for name in weights}
    assert found == {name: status for name, status, _, _ in layers}
    for name, _, words, _ in layers:
        assert words in rows[name]["reason"], (name, rows[name]["reason"])
        assert ("share a mean" in rows[name]["reason"]) == name.startswith("mean of"), name


def test_statuses_do_not_depend_on_the_rule_of_the_tail():
    rng = np.random.default_rng(0)
    weights = {"noise": rng.standard_normal((64, 64)), "orthogonal": np.linalg.qr(rng.standard_normal((64, 64)))[0]}
    weights |= {"heavy": weights["noise"] * np.arange(1, 65), "head": weights["noise"][:2]}
    found = {}
    for rule in ("median", "ks"):
        settings = {"tail": farms_jax.Tail(rule), "resamples": 0, "randomize": False}
        found[rule] = farms_jax.diagnose(weights, axes=farms_jax.TORCH_AXES, **settings)
    by_median, by_ks = found["median"], found["ks"]
    assert by_ks.column("status") == by_median.column("status")
    assert by_ks.column("median_alpha") == by_median.column("alpha")
    alphas = dict(zip(by_ks.names, by_ks.column("alpha"), strict=True))
    assert {name for name, alpha in alphas.items() if alpha is None} == {"orthogonal", "head"}  # not 1e14
    assert alphas["noise"] != by_median.column("alpha")[by_median.names.index("noise")]
