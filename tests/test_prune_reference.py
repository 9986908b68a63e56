"""Whole models pruned as the reference does it: masks, weights, statistics, alphas and logits of the tiny models."""

import functools

import numpy as np
import pytest

import farms_jax
from farms_jax import Tail, Window, allocate_sparsity
from prune.allocation import Plan, sizes_of
from prune.forward import embed, run_blocks
from prune.methods import Groups
from prune.models import make_network
from prune.pruning import STATISTIC, prune_block
from prune.scores import measure_alphas
from tests.helpers import load_cases
from tests.prune_helpers import config_of, logits_of, weights_of

FAST = [("llama_tiny", f"{method}_farms") for method in ("magnitude", "wanda", "sparsegpt")]
FAST += [("opt_tiny", "wanda_farms")]
RUNS = [
    pytest.param(model, tag, marks=() if (model, tag) in FAST else pytest.mark.slow)
    for model in ("llama_tiny", "opt_tiny")
    for tag in load_cases(model)[0]["pruning"]["runs"]
]


@functools.cache
def model_of(name):
    """Network, tensors by name, and the fixture's names of layers with ours."""
    network = make_network(config_of(name))
    names = load_cases(name)[0]["pruning"]["layer_names"]  # in the same order
    return network, weights_of(name), dict(zip(names, network.layer_shapes(), strict=True))


def plan_of(model, tag):
    settings, arrays = load_cases(model)
    layers = model_of(model)[2].values()
    method, *rest = tag.split("_")
    if rest == ["farms"]:
        return Plan(method, dict(zip(layers, arrays["prune/ratios"], strict=True)))
    uniform = dict.fromkeys(layers, settings["pruning"]["sparsity"])
    if rest and rest[0].isdigit():
        return Plan(method, uniform, dict.fromkeys(layers, Groups(*map(int, rest))))
    return Plan("wanda_variant" if rest == ["variant"] else method, uniform)


@functools.cache
def prune(model, tag):
    """Masks, weights, statistics of all layers, and logits of the first sequence of the fixture."""
    network, tensors, _ = model_of(model)
    _, arrays = load_cases(model)
    ids = arrays.get("calib_ids", load_cases("llama_tiny")[1]["calib_ids"])
    plan, masks, weights, seen = plan_of(model, tag), {}, dict(tensors), {}

    def visit(block, tensors, statistics):
        pruned = prune_block(network, block, tensors, statistics, plan)
        masks.update(pruned.masks)
        weights.update(pruned.tensors)
        seen.update(statistics)
        return pruned.tensors

    read, statistic = tensors.__getitem__, STATISTIC[plan.method]
    activations = embed(network, read, ids)
    run_blocks(network, read, activations, title="prune", visit=visit, statistic=statistic, calibration=len(ids))
    return masks, weights, seen, logits_of(network, weights, arrays[f"{model}/ids"][:1])


@pytest.mark.parametrize(("model", "tag"), RUNS)
def test_pruned_as_the_reference(model, tag):
    settings, arrays = load_cases(model)
    masks, weights, _, logits = prune(model, tag)
    stored, swapped = settings["pruning"]["runs"][tag]["stored"], 0
    for short, layer in model_of(model)[2].items():
        if stored == "mask":
            np.testing.assert_array_equal(masks[layer], arrays[f"prune/{tag}/keep/{short}"], err_msg=short)
        else:
            expected = arrays[f"prune/{tag}/weight/{short}"]
            found = weights[f"{layer}.weight"]
            flipped = (found == 0) != (expected == 0)
            # Two scores that differ by rounding only may swap; what else is in that row is then updated otherwise.
            assert flipped.mean() <= 2e-4, short
            swapped += flipped.sum()
            same = ~flipped.any(axis=1)
            np.testing.assert_allclose(found[same], expected[same], atol=2e-5, err_msg=short)
    expected = arrays[f"prune/{tag}/logits"]
    atol = 2e-2 if swapped else 1e-4 * expected.std()
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=atol)
    removed = sum((~mask).sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())
    assert removed == pytest.approx(settings["pruning"]["runs"][tag]["sparsity"], abs=1e-9)


def test_statistics_equal_the_reference():
    _, arrays = load_cases("llama_tiny")
    for tag, key in (("wanda_farms", "scaler_row"), ("sparsegpt_farms", "hessian_diag")):
        _, _, seen, _ = prune("llama_tiny", tag)
        for short, layer in model_of("llama_tiny")[2].items():
            found = np.asarray(seen[layer])
            found = found if found.ndim == 1 else np.diag(found)
            np.testing.assert_allclose(found, arrays[f"prune/{tag}/{key}/{short}"], rtol=1e-4, err_msg=short)


@pytest.mark.parametrize(
    ("key", "windows", "rule"),
    [("farms_peak", True, "peak"), ("farms_mid", True, "median"), ("nosample_peak", False, "peak")],
)
def test_alphas_and_ratios_equal_the_reference(key, windows, rule, tmp_path):
    settings, arrays = load_cases("llama_tiny")
    network, tensors, layers = model_of("llama_tiny")
    farms = settings["pruning"]["farms"]
    window = Window(farms["num_row_samples"], farms["Q_ratio"], per_axis=farms["sampling_ops_per_dim"])
    alphas = measure_alphas(network, tensors.get, window if windows else None, Tail(rule), tmp_path, "alphas")
    assert list(alphas) == list(layers.values())
    np.testing.assert_allclose(list(alphas.values()), arrays[f"prune/alphas_{key}"], rtol=1e-3)
    if key == "farms_peak":
        found = allocate_sparsity(
            alphas,
            sparsity=settings["pruning"]["sparsity"],
            epsilon=settings["pruning"]["epsilon"],
            block_of=farms_jax.block_of,
            num_params=sizes_of(network.layer_shapes()),
        )
        np.testing.assert_allclose(list(found.values()), arrays["prune/ratios"], rtol=1e-3)


def test_alphas_are_kept_by_the_weights(tmp_path, monkeypatch):
    network, tensors, _ = model_of("llama_tiny")
    analyses, analyze = [], farms_jax.analyze
    monkeypatch.setattr(farms_jax, "analyze", lambda *a, **k: analyses.append(1) or analyze(*a, **k))

    def again(tensors, window=None):
        analyses.clear()
        found = measure_alphas(network, tensors.get, window, Tail(), tmp_path, "alphas")
        return len(analyses), found

    count, first = again(tensors)
    assert count == 4
    assert again(tensors) == (0, first)
    assert again(tensors, Window(48, per_axis=4))[0] == 4  # other settings
    up = "model.layers.2.mlp.up_proj.weight"
    assert again(tensors | {up: tensors[up] * 1.5})[0] == 1  # other weights under the same name
