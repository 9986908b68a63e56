"""Allocations that are judged by pruned models: sensitivity, and the search."""

import contextlib
import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import few
from prune_helpers import Killed, assert_same_run, card_of, config_of, logits_of, small_run, weights_of, write_folder

import prune.record
import prune.search
from farms_jax import block_of
from farms_jax.errors import InputError
from prune.allocation import Plan, plan_of, sparsities
from prune.checkpoints import open_checkpoint
from prune.config import EPSILON
from prune.forward import read_part
from prune.job import prepare
from prune.levels import Levels, build_levels
from prune.models import make_network
from prune.perplexity import perplexity
from prune.pruning import simulate
from prune.run import run
from prune.search import LEVELS, Ladder, ladder_of, offspring_of
from prune.sensitivity import measured_sensitivity, score_by_sensitivity
from prune.variants import divergences, run_variants, variant_of


def tensors_of(job):
    """All tensors of the dense model."""
    return {name: job.checkpoint.read(name) for name in job.checkpoint.tensors}


def divergence(expected, found):
    """KL(expected || found) of the distributions of logits (N, T, V), the mean over tokens of each sequence."""
    logs = []
    for logits in (expected, found):
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean(-1)


# --- Sensitivity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "layers"), [("block", 7), ("layer", 1)])
def test_sensitivity_is_the_divergence_when_one_unit_is_pruned(granularity, layers, tmp_path, monkeypatch):
    monkeypatch.setattr("prune.sensitivity._TOGETHER", 3)
    settings = {"method": "magnitude", "allocation": "sensitivity", "granularity": granularity, "sparsity": 0.6}
    job = prepare(small_run(tmp_path, **settings))
    assert len(job.unseen) == 2
    found, dense = measured_sensitivity(job), tensors_of(job)
    expected = logits_of(job.network, dense, jnp.asarray(job.unseen))
    assert len(found) == 28 / layers
    for unit in list(found)[:: 28 // layers // 4]:
        pruned = dict(dense)
        names = [name for name in dense if "_proj" in name and f"{name}.".startswith(f"{unit}.")]
        assert len(names) == layers
        for name in names:
            magnitudes = np.abs(dense[name])
            pruned[name] = np.where(magnitudes > np.sort(magnitudes, None)[int(0.6 * magnitudes.size)], dense[name], 0)
        logits = logits_of(job.network, pruned, jnp.asarray(job.unseen))
        assert found[unit] == pytest.approx(divergence(expected, logits).mean(), rel=1e-3)

    monkeypatch.setattr("prune.sensitivity.build_levels", None)  # would fail: it is known
    shapes, scores = job.network.layer_shapes(), score_by_sensitivity(job)
    allocated = sparsities(job.config, scores, shapes, 0.15)
    sizes = {layer: np.prod(shape) for layer, shape in shapes.items()}
    assert np.average([allocated[layer] for layer in shapes], weights=list(sizes.values())) == pytest.approx(0.6)
    unit_of = block_of if granularity == "block" else str
    of_unit = {unit: [layer for layer in shapes if unit_of(layer) == unit] for unit in found}
    per_weight = [found[unit] / sum(sizes[layer] for layer in names) for unit, names in of_unit.items()]
    order = np.argsort(per_weight)
    values = np.array([allocated[names[0]] for names in of_unit.values()])
    assert (np.diff(values[order]) < 0).all()
    assert np.ptp(values) == pytest.approx(0.3)


def test_nothing_is_sensitive_to_nothing(tmp_path):
    job = prepare(small_run(tmp_path, method="magnitude", allocation="sensitivity", sparsity=0.0))
    assert set(measured_sensitivity(job).values()) == {0.0}
    assert set(score_by_sensitivity(job).values()) == {0.0}


# --- Levels and variants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), few([("wanda", np.float32), ("sparsegpt", ml_dtypes.bfloat16)], 2))
def test_variants_are_the_models_put_together_from_levels(method, dtype, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in weights_of("llama_tiny").items()}
    source = write_folder(tmp_path / "source", tensors)
    job = prepare(small_run(tmp_path, source, method=method, allocation="sensitivity"))
    shapes, network = job.network.layer_shapes(), job.network
    plans = [Plan(method, dict.fromkeys(shapes, sparsity)) for sparsity in (0.25, 0.5)]
    levels = build_levels(job, plans, tmp_path / "levels", "levels")
    random = np.random.default_rng(0)
    chosen = [{layer: int(level) for layer in shapes if (level := random.integers(3)) < 2} for _ in range(3)]
    chosen[1] |= {layer: chosen[0][layer] for layer in shapes if ".0." in layer and layer in chosen[0]}
    variants = [variant_of(network, levels_) for levels_ in (*chosen, {})]
    outputs = run_variants(job, levels, variants, job.unseen, "variants")
    found = divergences(job, outputs[-1], outputs[:-1])
    expected = logits_of(network, tensors, jnp.asarray(job.unseen))
    for of_layer, variant, of_variant in zip(chosen, variants, found, strict=False):
        stitched = dict(tensors)
        for block in range(network.num_blocks):
            stitched |= levels.apply(block, read_part(network, block, job.checkpoint.read), variant[block])
        for layer in shapes:
            weight, level = stitched[f"{layer}.weight"], of_layer.get(layer)
            assert (weight == 0).mean() == pytest.approx({0: 0.25, 1: 0.5, None: 0}[level], abs=0.03)
            changed = weight[weight != 0] != tensors[f"{layer}.weight"][weight != 0]
            assert changed.any() == (method == "sparsegpt" and level is not None)
        logits = logits_of(network, stitched, jnp.asarray(job.unseen))
        np.testing.assert_allclose(of_variant, divergence(expected, logits), rtol=1e-3)
    assert len(set(map(tuple, found))) == 3
    again = divergences(job, outputs[-1], run_variants(job, levels, variants[:1], job.unseen[1:], "one"), [1])
    np.testing.assert_allclose(again[0, 0], found[0, 1], rtol=1e-4)


def test_levels_hold_weights_that_were_changed(tmp_path):
    network, random = make_network(config_of("llama_tiny")), np.random.default_rng(0)
    layers = [network.layer_name(1, linear) for linear in network.linears]
    shapes = {f"{layer}.weight": network.layer_shapes()[layer] for layer in layers}
    dense, others = (
        {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
        for _ in range(2)
    )
    masks = {layer: random.random(shapes[f"{layer}.weight"]) > 0.6 for layer in layers}
    pruned = {
        name: np.where(masks[name.removesuffix(".weight")], array, np.zeros((), array.dtype))
        for name, array in others.items()
    }
    for name, array in dense.items():
        array[:, masks[name.removesuffix(".weight")][0]] = 0  # zeros of the dense model, some of them kept
    levels = Levels(tmp_path, network)
    levels.write(1, 0, dense, pruned, masks)
    found = levels.apply(1, dense, (0, None, 0, 0, None, 0, 0))
    for number, name in enumerate(shapes):
        np.testing.assert_array_equal(found[name], (dense if number in {1, 4} else pruned)[name], err_msg=name)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="level0.npz is damaged or gone"):
        levels.apply(1, dense, (0,) * 7)


def test_levels_of_a_stopped_pass_are_those_of_one_that_was_not(tmp_path, monkeypatch):
    job = prepare(small_run(tmp_path, method="wanda", allocation="sensitivity"))
    plans = [Plan("wanda", dict.fromkeys(job.network.layer_shapes(), sparsity)) for sparsity in (0.3, 0.6)]
    build_levels(job, plans, tmp_path / "whole", "whole")
    write, left = Levels.write, 5

    def stopped(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(Levels, "write", stopped)
    with pytest.raises(Killed):
        build_levels(job, plans, tmp_path / "stopped", "stopped")
    assert len(list((tmp_path / "stopped").iterdir())) == 4
    build_levels(job, plans, tmp_path / "stopped", "again")
    for path in (tmp_path / "whole").iterdir():
        with np.load(path) as whole, np.load(tmp_path / "stopped" / path.name) as other:
            assert all((whole[name] == other[name]).all() for name in whole)


# --- The search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("settings", [{"sparsity": 0.9}, {"sparsity": 0.1}, {"sparsity": 0.45, "groups": "4:8"}])
def test_offspring_keep_the_budget_and_the_bounds(granularity, settings, tmp_path):
    job = prepare(small_run(tmp_path, allocation="search", method="magnitude", granularity=granularity, **settings))
    shapes, random = job.network.layer_shapes(), np.random.default_rng(3)
    weights = np.array([np.prod(shape) for shape in shapes.values()])
    start = sparsities(dataclasses.replace(job.config, allocation="atp"), depth(job), shapes, 0.08)
    ladder = ladder_of(job.config, start, shapes)
    parent = np.zeros(len(ladder.base), int)
    budget = np.average([*ladder.sparsity(parent).values()], weights=weights)
    assert budget == pytest.approx(settings["sparsity"], abs=0.02 if "groups" in settings else 1e-9)
    for _ in range(30):
        children = offspring_of(ladder, parent, random)
        assert 4 < len(children) == len({tuple(child) for child in children} - {tuple(parent)}) <= 12
        for child in children:
            values = np.array([*ladder.sparsity(child).values()])
            assert np.average(values, weights=weights) == pytest.approx(budget, abs=1e-9)
            assert (values >= 0).all()
            assert (values <= 0.998).all()
            assert (np.abs(child) <= LEVELS).all()
            plan = plan_of(job.config, ladder.sparsity(child), shapes)
            assert [plan.asked(layer) for layer in shapes] == pytest.approx(values)
            units = {block_of(layer): value for layer, value in zip(shapes, values, strict=True)}
            assert granularity == "layer" or [units[block_of(layer)] for layer in shapes] == values.tolist()
        parent = children[-1]
    assert np.ptp(parent) > 1


def depth(job):
    """A score that rises from block to block."""
    return {layer: float(layer.split(".")[2]) for layer in job.network.layer_shapes()}


def test_units_that_cannot_exchange_weights_have_no_offspring():
    sparsity, step, (moved, lowest, highest) = np.full(2, 0.5), np.full(2, 0.1), np.array([[1, 2], [-4, -4], [4, 4]])
    ladder = Ladder({"a": ["a"], "b": ["b"]}, sparsity, step, moved, lowest, highest)
    assert offspring_of(ladder, np.zeros(2, int), np.random.default_rng(0)) == []


@pytest.fixture(scope="module", params=few(["some", "all"], 2))
def searched(request, tmp_path_factory):
    """A search that has ended, from some of the allocations or all of them; others begin with the same."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "some":  # without those that analyse spectra
            names = ("uniform", "ends", "atp", "dlp", "sensitivity")
            patch.setattr(prune.search, "STARTS", {name: (name, {}) for name in names})
        job = prepare(small_run(folder, allocation="search", method="wanda", sparsity=0.6, search_generations=6))
        run(job)
        yield job


def test_the_result_is_never_worse_than_a_start_on_the_held_out_text(searched):
    card = card_of(searched.path)
    judged, history = (card["allocation"]["search"][key] for key in ("held_out_perplexity", "history"))
    assert len(set(judged) - set(prune.search.STARTS)) == 3  # two means, and what evolved
    value = perplexity(searched.network, open_checkpoint(str(searched.path / "model")), searched.unseen).value
    assert value == pytest.approx(min(judged.values()), rel=1e-6)
    falling = [entry["divergence"] for entry in history]
    assert falling == sorted(falling, reverse=True)
    assert len(falling) > 1
    assert card["sparsity"]["reached"] == pytest.approx(0.6, abs=1e-3)
    assert not (searched.path / "levels").exists()

    # A start is judged as a run under its allocation would be pruned.
    config = dataclasses.replace(searched.config, allocation="atp")
    shapes, job = searched.network.layer_shapes(), dataclasses.replace(searched, config=config)
    plan = plan_of(config, sparsities(config, depth(searched), shapes, EPSILON["atp"]), shapes)
    assert simulate(job, plan, searched.unseen, "atp").perplexity == judged["atp"]


@pytest.mark.parametrize("steps", few([4, 5], 2))
def test_a_stopped_search_finds_the_same(steps, searched, tmp_path, monkeypatch):
    """Every process of the run gets so many records further."""
    left, write = 0, prune.record.write_json

    def counted(*arguments, **keywords):
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        write(*arguments, **keywords)

    monkeypatch.setattr(prune.record, "write_json", counted)
    config = dataclasses.replace(searched.config, out=tmp_path / "out")
    stops = 0
    while not (prepare(config).path / "run.json").exists():
        left = steps
        with contextlib.suppress(Killed):
            run(prepare(config))
            break
        stops += 1
        assert stops < 50, "it does not get on"
    assert stops > 5
    assert_same_run(prepare(config).path, searched.path)


def test_minutes_end_a_search(tmp_path, monkeypatch):
    monkeypatch.setattr(prune.search, "STARTS", {"uniform": ("uniform", {}), "ends": ("ends", {}), "atp": ("atp", {})})
    job = prepare(small_run(tmp_path, allocation="search", method="magnitude", search_minutes=1e-9))
    run(job)
    assert card_of(job.path)["allocation"]["search"]["generation"] == 1
