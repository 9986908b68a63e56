"""allocate_sparsity: the reference's figures, arguments, groups; `faults/test_properties.py` draws budgets."""

import itertools
from typing import Any

import numpy as np
import pytest

import farms_jax
from farms_jax import allocate_sparsity, round_to_groups
from tests.helpers import load_cases, pairwise, report_of

FIXTURE, ARRAYS = load_cases("sparsity_alloc")
RNG = np.random.default_rng(5)
SCORES = {f"blocks.{i}.{name}": float(RNG.uniform(1.5, 6)) for i in range(6) for name in ("q", "up")}
SIZES = {layer: 300 if layer.endswith("up") else 100 for layer in SCORES}


def fixture_case(case):
    layers = [name.split(".", 1)[1] for name in FIXTURE["layer_order_in_block"]]
    names = [f"{i}.{layer}" for i in range(FIXTURE["sizes"][case["model"]]["blocks"]) for layer in layers]
    scores = dict(zip(names, ARRAYS[f"alphas/{case['alphas']}"], strict=True))
    sizes = dict(zip(names, ARRAYS[f"numel/{case['model']}"].tolist(), strict=True))
    return scores, sizes, ARRAYS[f"ratios/{case['case']}"]


def removed(sparsity, sizes):
    return sum(sparsity[layer] * sizes[layer] for layer in sizes) / sum(sizes.values())


CASES = pairwise(FIXTURE["cases"], "model", "alphas", "sparsity", "epsilon")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_reference_budget_equals_the_reference(case):
    scores, sizes, expected = fixture_case(case)
    settings = {"sparsity": case["sparsity"], "epsilon": case["epsilon"], "num_params": sizes}
    found = allocate_sparsity(scores, block_of=farms_jax.block_of, budget="reference", **settings)
    assert list(found) == list(scores)
    np.testing.assert_allclose(list(found.values()), expected, rtol=2e-7)
    exact = allocate_sparsity(scores, block_of=farms_jax.block_of, **settings)
    assert removed(exact, sizes) == pytest.approx(case["sparsity"], rel=1e-12)
    assert max(exact.values()) <= 0.998
    if not case["n_clipped"] and expected.max() <= 0.998:  # nothing capped: the two budgets are one
        np.testing.assert_allclose(list(exact.values()), expected, rtol=2e-7)


def test_shift_keeps_the_range_and_scale_the_quotient():
    shift = allocate_sparsity(SCORES, sparsity=0.6, epsilon=0.08, num_params=SIZES, rule="shift")
    assert max(shift.values()) - min(shift.values()) == pytest.approx(0.16)
    scale = allocate_sparsity(SCORES, sparsity=0.4, epsilon=0.25, num_params=SIZES)
    assert max(scale.values()) / min(scale.values()) == pytest.approx(1.25 / 0.75)


def test_layers_of_a_block_share_the_mean_score():
    found = allocate_sparsity(SCORES, sparsity=0.5, epsilon=0.3, num_params=SIZES, block_of=farms_jax.block_of)
    assert all(found[f"blocks.{i}.q"] == found[f"blocks.{i}.up"] for i in range(6))
    means = {f"blocks.{i}": (SCORES[f"blocks.{i}.q"] + SCORES[f"blocks.{i}.up"]) / 2 for i in range(6)}
    alone = allocate_sparsity(means, sparsity=0.5, epsilon=0.3, num_params=dict.fromkeys(means, 400))
    assert [found[f"blocks.{i}.q"] for i in range(6)] == pytest.approx(list(alone.values()))


def test_report_brings_its_sizes_and_a_layer_without_tail_stands_at_the_mean():
    alphas = {**SCORES, "blocks.0.q": 0.0}
    report = report_of(names=alphas, alpha=list(alphas.values()), num_params=[SIZES[layer] for layer in alphas])
    found = allocate_sparsity(report, sparsity=0.5, epsilon=0.3)
    others = [value for layer, value in alphas.items() if layer != "blocks.0.q"]
    expected = allocate_sparsity(
        {**alphas, "blocks.0.q": float(np.mean(others))}, sparsity=0.5, epsilon=0.3, num_params=SIZES
    )
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("scores", [{"a": 3.0}, {"a": 2.0, "b": 2.0}])
def test_equal_scores_are_uniform(scores):
    found = allocate_sparsity(scores, sparsity=0.6, epsilon=0.5, num_params=dict.fromkeys(scores, 10))
    assert list(found.values()) == pytest.approx([0.6] * len(scores))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 1.2}, "sparsity must be in"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"epsilon": 1.5, "rule": "shift"}, "epsilon"),
        ({"epsilon": 1.0}, "below 1"),
        ({"rule": "other"}, "rule"),
        ({"budget": "other"}, "budget"),
        ({"rule": "shift", "budget": "reference"}, "rule='scale'"),
        ({"highest": 0.4}, "highest"),
        ({"num_params": None}, "num_params"),
        ({"num_params": {}}, "num_params"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        allocate_sparsity(SCORES, **{"sparsity": 0.5, "epsilon": 0.3, "num_params": SIZES, **change})


def test_bad_scores():
    with pytest.raises(ValueError, match=r"blocks\.1\.q is not finite"):
        allocate_sparsity({**SCORES, "blocks.1.q": float("nan")}, sparsity=0.5, epsilon=0.3, num_params=SIZES)
    with pytest.raises(ValueError, match="no layers"):
        allocate_sparsity({}, sparsity=0.5, epsilon=0.3, num_params={})


@pytest.mark.parametrize(("group", "sparsity"), [(1, 0.61), (4, 0.25), (4, 0.61), (8, 0.5), (8, 0.75)])
def test_mixed_groups_keep_the_global_budget(group, sparsity):
    sizes = dict.fromkeys(SCORES, 64)
    wanted = allocate_sparsity(SCORES, sparsity=sparsity, epsilon=0.4, num_params=sizes)
    found = round_to_groups(wanted, sizes, group=group)
    most = max(group - 1, 1)  # one of each group stays; what that leaves, others remove
    assert all(0 <= n <= most for n in found.values())
    if all(wanted[layer] * group <= most for layer in found):
        assert all(abs(found[layer] / group - wanted[layer]) < 1 / group + 1e-9 for layer in found)
    assert abs(sum(found.values()) - group * len(found) * sparsity) <= 0.5 + 1e-6


def test_mixed_groups_by_block_and_of_a_uniform_half():
    wanted = allocate_sparsity(SCORES, sparsity=0.5, epsilon=0.4, num_params=SIZES, block_of=farms_jax.block_of)
    found = round_to_groups(wanted, SIZES, group=8, block_of=farms_jax.block_of)
    assert all(found[f"blocks.{i}.q"] == found[f"blocks.{i}.up"] for i in range(6))
    assert len(set(found.values())) > 1
    assert set(round_to_groups(dict.fromkeys(SCORES, 0.5), SIZES, group=4).values()) == {2}
    with pytest.raises(ValueError, match="group"):
        round_to_groups(wanted, SIZES, group=0)
    with pytest.raises(ValueError, match=r"one for all of blocks\.0"):
        round_to_groups(
            wanted, SIZES, group={**dict.fromkeys(SCORES, 4), "blocks.0.up": 8}, block_of=farms_jax.block_of
        )


def test_whole_numbers_of_each_row_keep_the_global_budget():
    inputs = {layer: 20 if layer.endswith("up") else 7 for layer in SCORES}
    wanted = allocate_sparsity(SCORES, sparsity=0.63, epsilon=0.4, num_params=SIZES)
    found = round_to_groups(wanted, SIZES, group=inputs)
    assert all(abs(found[layer] / inputs[layer] - wanted[layer]) < 1 / inputs[layer] + 1e-9 for layer in found)
    reached = {layer: found[layer] / inputs[layer] for layer in found}
    assert abs(removed(reached, SIZES) - 0.63) * sum(SIZES.values()) <= 100 / 7  # a step of the smallest layer


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_met_as_nearly_as_whole_numbers_can(seed):
    """Against all ways to round the fractions of layers of many sizes up or down, N of each group below M."""
    random, group = np.random.default_rng(seed), int(2 ** (seed % 4 + 1))
    sizes = {str(layer): group * int(random.integers(1, 300)) for layer in range(8)}
    wanted = {layer: float(random.choice([random.uniform(0, 1), 0.5, 0.99, 1])) for layer in sizes}
    ways = []
    for layer in sizes:
        below = int(np.floor(wanted[layer] * group + 1e-9))
        ways.append({below, max(min(below + 1, group - 1), below)})

    def gap(found):
        return abs(sum(sizes[layer] * (found[layer] / group - wanted[layer]) for layer in sizes))

    best = min(gap(dict(zip(sizes, numbers, strict=True))) for numbers in itertools.product(*ways))
    assert gap(round_to_groups(wanted, sizes, group=group)) <= best + 1e-6


def test_many_layers_of_different_sizes_meet_the_budget_to_a_few_weights():
    random = np.random.default_rng(0)
    shapes = {str(layer): random.integers(50, 3000, 2).tolist() for layer in range(60)}
    sizes = {layer: rows * columns for layer, (rows, columns) in shapes.items()}
    wanted = {layer: float(random.uniform(0.2, 0.95)) for layer in shapes}
    found = round_to_groups(wanted, sizes, group={layer: columns for layer, (_, columns) in shapes.items()})
    assert (
        abs(sum(shapes[layer][0] * found[layer] - sizes[layer] * wanted[layer] for layer in shapes)) < 25
    )  # half a row


@pytest.mark.parametrize(
    ("sparsity", "group", "message"),
    [
        (1.5, 4, r"sparsity of a must be in \[0, 1\], got 1\.5"),
        (-0.5, 4, "got -0.5"),
        (float("nan"), 4, "got nan"),
        (0.5, 4.0, "group must be .* got 4.0"),
        (0.5, {"b": 4}, "group must be .* got None"),
        (0.5, -1, "group must be"),
    ],
)
def test_what_cannot_be_rounded_is_refused(sparsity, group, message):
    with pytest.raises(ValueError, match=message):
        round_to_groups({"a": sparsity}, {"a": 64}, group=group)
    with pytest.raises(ValueError, match="no size for a"):
        round_to_groups({"a": 0.5}, {}, group=4)
    of_numpy: Any = {"sparsity": {"a": np.float32(0.5)}, "group": np.int64(4)}
    assert round_to_groups(num_params={"a": 64}, **of_numpy) == {"a": 2}
    assert round_to_groups({}, {}, group=4) == {}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.decoder.layers.3.fc1", "model.decoder.layers.3"),
        ("layer1.0.conv2.weight", "layer1.0"),
        ("conv1/kernel", "conv1/kernel"),
        ("lm_head.weight", "lm_head.weight"),
        ("3.self_attn.q_proj", "3"),
        ("Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel", "Transformer/encoderblock_3"),
        ("Transformer/encoderblock/MlpBlock_0/Dense_0/kernel[3]", "Transformer/encoderblock[3]"),
        ("params/ScanBlock_0/Dense_0/kernel[3]", "params/ScanBlock_0[3]"),
        ("blk.3.ffn_up_exps.weight[7]", "blk.3"),
        ("Block_3/MoE_0/wi[7]", "Block_3"),
        ("params/Dense_0/kernel[3]", "params[3]"),
    ],
)
def test_block_of(name, block):
    assert farms_jax.block_of(name) == block


@pytest.mark.parametrize("budget", ["exact", "reference"])
def test_a_stacked_model_has_the_sparsities_of_its_layers_one_by_one(budget):
    rng, layers, experts = np.random.default_rng(0), 3, 4
    up = rng.standard_normal((24, layers, 40)) + rng.standard_normal((24, layers, 1)) * np.arange(layers)[:, None]
    wi = rng.standard_normal((experts, layers, 24, 32)).astype(np.float32)
    stacked = {"layers": {"up": {"kernel": up}, "moe": {"wi": wi}}}
    one_by_one = {f"layers_{i}": {"up": {"kernel": up[:, i]}, "moe": {"wi": wi[:, i]}} for i in range(layers)}
    of_stack = farms_jax.analyze(stacked, stack={"layers/up/.*": 1, "layers/moe/.*": (1, 0)})
    alone = farms_jax.analyze(one_by_one, stack={".*/moe/.*": 0})
    settings = {"sparsity": 0.6, "epsilon": 0.3, "block_of": farms_jax.block_of, "budget": budget}
    found, wanted = (allocate_sparsity(report, **settings) for report in (of_stack, alone))
    for i in range(layers):
        assert found[f"layers/up/kernel[{i}]"] == pytest.approx(wanted[f"layers_{i}/up/kernel"], rel=1e-6)
        for j in range(experts):
            assert found[f"layers/moe/wi[{i},{j}]"] == pytest.approx(wanted[f"layers_{i}/moe/wi[{j}]"], rel=1e-6)
    assert len(set(found.values())) == layers
