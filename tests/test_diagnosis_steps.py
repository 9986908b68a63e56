"""What a diagnosis leads to: layers by type, steps, rates, recipes, and a table of models."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from diagnosis_samples import diagnosis

import farms_jax
from farms_jax.diagnosis import read_rates
from farms_jax.diagnosis.exports import prunable, rates, recipe
from farms_jax.diagnosis.ranking import rank_models
from farms_jax.diagnosis.steps import steps
from farms_jax.errors import InputError

FACTS = {"path": "a model.gguf", "format": "gguf"}


def rows(*layers):
    """Rows of (name, type, status, alpha), all of 64 x 64."""
    names = ("layer", "type", "status", "alpha")
    return [dict(zip(names, layer, strict=True), shape="64x64", num_params=4096) for layer in layers]


def blocks(count=4, status="well trained"):
    return rows(
        *(
            (f"layers.{i}.mlp.{kind}_proj.weight", kind, status, 1.5 + i / 10)
            for i in range(count)
            for kind in ("up", "down")
        )
    )


def test_a_summary_by_type_and_of_the_model():
    found = diagnosis(4)
    summary, types = found.summary(), found.types()
    alphas = [row["alpha"] for row in found.layers if row["alpha"]]
    sizes = [row["num_params"] for row in found.layers if row["alpha"]]
    assert summary["alpha"] == pytest.approx(np.mean(alphas))
    assert summary["alpha_weighted"] == pytest.approx(np.average(alphas, weights=sizes))
    assert (summary["layers"], summary["degenerate"], summary["well_trained"]) == (16, 1, 12)
    assert {name: part["layers"] for name, part in types.items()} == {"down": 4, "k": 4, "q": 4, "up": 4}
    assert types["k"]["alpha"] == pytest.approx(np.mean([row["alpha"] for row in found.layers if row["type"] == "k"]))


def test_steps_name_what_stands_out_and_the_command():
    layers = blocks()
    layers[0] |= {"status": "degenerate"}
    for row in layers[1::2]:
        row["status"] = "undertrained"
    dead, noise, balance, prune = steps(layers, FACTS)
    assert dead.found == "1 of 8 layers is degenerate: layers.0.mlp.up_proj.weight"
    assert dead.code == ("farms analyze 'a model.gguf' --exclude 'layers\\.0\\.mlp\\.up_proj\\.weight'",)
    assert noise.found.startswith("4 of 8 layers are undertrained: 4 of 4 down")
    assert balance.code[0] == "farms analyze 'a model.gguf' --rates rates.json"
    assert "model.named_parameters()" in balance.code[3]
    assert prune.code == ("farms analyze 'a model.gguf' --sparsity 0.5 --recipe recipe.yaml",)


def test_steps_of_models_where_nothing_or_everything_stands_out():
    assert steps(blocks(), FACTS)[0].attempt.startswith("nothing, by the weights alone")
    (noise,) = steps(blocks(status="undertrained"), FACTS)  # its differences are chance: no rates, no recipe
    assert noise.attempt.startswith("check which checkpoint")
    layers = blocks(8)
    for row in layers[:2]:
        row["status"] = "over-correlated"
    assert steps(layers, FACTS)[0].found == "2 of 16 layers are over-correlated: half or more of layers.0"
    one = rows(("dense/kernel", "dense", "well trained", 2.0))
    assert [step.found for step in steps(one, {})] == ["no layer stands out"]
    assert steps([], {}) == []
    dead = rows(("a", "a", "degenerate", None), ("b", "b", "degenerate", None))
    (step,) = steps(dead, {"path": "weights in memory", "format": "pytree"})
    assert (step.found, step.code) == ("2 of 2 layers are degenerate", ())
    few = rows(("a", "a", "too few to say", 1.5), ("b", "b", "too few to say", 2.5))  # chance: no rates either
    assert [step.found for step in steps(few, {})] == ["no layer has enough eigenvalues to be told from noise"]
    two = rows(("a/kernel", "a", "well trained", 1.5), ("b/kernel", "b", "well trained", 2.0))
    assert any("optax" in line for line in steps(two, FACTS)[1].code)


def modifiers(text):
    """The lists of targets of a recipe with their sparsities."""
    stage = yaml.safe_load(text)["pruning_stage"]
    parts = [modifier for group in stage.values() for modifier in group.values()]
    assert len(parts) == len(stage)
    return [dict(zip(one["targets"], one["sparsity"], strict=True)) for one in parts]


def test_a_recipe_has_a_sparsity_for_each_block_in_the_order_of_modules():
    layers = [*blocks(11), *rows(("lm_head.weight", "head", "well trained", 3.0))]
    (found,) = modifiers(recipe(layers, sparsity=0.7))
    assert list(found) == [f"re:(.*[.])?layers[.]{i}$" for i in range(11)]
    assert np.mean([*found.values()]) == pytest.approx(0.7, abs=1e-3)  # blocks of one size
    assert np.all(np.diff([*found.values()]) > 0)  # as their alphas grow
    assert len(prunable(layers)) == 22
    sequential = rows(*((f"{side}.{i}.weight", "linear", "well trained", 2.0) for side in "ab" for i in (0, 2, 4)))
    assert prunable(sequential) == []  # each is one layer, and the last the head
    assert prunable(layers[:4] + sequential) == layers[:4]
    numbered = rows(*((f"{i}.fc{j}.weight", "linear", "well trained", 2.0 + i) for i in (0, 1) for j in (1, 2)))
    assert [list(one) for one in modifiers(recipe(numbered, sparsity=0.5))] == [["re:0$", "re:1$"]]  # not fc.0
    assert "ignore: []" in recipe(layers, sparsity=0.5)
    routed = [*layers, *rows(("layers.0.mlp.gate.weight", "router", "", 2.0))]
    assert 'ignore: ["re:.*[.](gate|router)$"]' in recipe(routed, sparsity=0.5)
    for wrong, message in (((layers[-1:], 0.5), "two numbered blocks"), ((layers, 1.0), "--sparsity")):
        with pytest.raises(InputError, match=message):
            recipe(wrong[0], sparsity=wrong[1])


def test_what_torch_may_have_made_in_another_order_is_in_a_modifier_of_its_own():
    layers = blocks(11)
    layers[0] |= {"alpha": 3.0}
    down, up = modifiers(recipe(layers, sparsity=0.6, each="layer"))
    assert list(up) == [f"re:(.*[.])?layers[.]{i}[.]mlp[.]up_proj$" for i in range(11)]
    assert list(down) == [target.replace("up_proj", "down_proj") for target in up]
    values = {**up, **down}
    assert np.mean([*values.values()]) == pytest.approx(0.6, abs=1e-3)
    assert max(values, key=values.__getitem__) == "re:(.*[.])?layers[.]0[.]mlp[.]up_proj$"  # of the largest alpha
    both = [row | {"layer": f"{side}.{row['layer']}"} for side in ("encoder", "decoder") for row in blocks(2)]
    assert [len(one) for one in modifiers(recipe(both, sparsity=0.5))] == [2, 2]  # an encoder comes before its decoder


def test_rates_go_from_the_smallest_alpha_to_the_largest():
    layers = rows(
        ("a.weight", "a", "", 1.5), ("b.weight", "b", "", 2.0), ("c.weight", "c", "", 3.5), ("d", "d", "", None)
    )
    layers += rows(("e", "e", "too few to say", 9.0), ("f", "f", "degenerate", 1.1))
    found = rates(layers, [("b.bias", "bias"), ("norm.weight", "bias")])
    expected = {"a.weight": 0.5, "b.weight": 0.75, "c.weight": 1.5, "d": 1.0, "e": 1.0, "f": 1.0, "b.bias": 0.75}
    assert found["factors"] == pytest.approx(expected)
    assert set(rates(layers[:1])["factors"].values()) == {1.0}


def test_rates_come_back_as_a_tree_for_optax(tmp_path):
    params = {
        "blocks": {"up": {"kernel": jnp.ones((8, 3, 4)), "bias": jnp.ones((3, 4))}},
        "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
        "norm": jnp.ones(4),
    }
    layers = rows(*((f"blocks/up/kernel[{i}]", "up", "", 1.0 + i) for i in range(3)), ("head/kernel", "head", "", 2.0))
    found = dataclasses.replace(diagnosis(1), layers=tuple(layers), left_out=())
    found.write_rates(tmp_path / "rates.json")
    scale = read_rates(tmp_path / "rates.json", params)
    np.testing.assert_allclose(scale["blocks"]["up"]["kernel"][:, :, 0], [[0.5, 1.0, 1.5]])
    assert (scale["head"]["kernel"], scale["head"]["bias"], scale["norm"]) == (1.0, 1.0, 1.0)
    multiply = optax.stateless(lambda updates, _: optax.tree.mul(updates, scale))
    updates, _ = multiply.update(params, multiply.init(params))
    np.testing.assert_allclose(updates["blocks"]["up"]["kernel"][0, :, 0], [0.5, 1.0, 1.5])
    with pytest.raises(InputError, match="names none of these"):
        read_rates(tmp_path / "rates.json", {"other": jnp.ones((2, 2))})
    (tmp_path / "rates.json").write_text("{}")
    with pytest.raises(InputError, match="no rates; make some"):
        read_rates(tmp_path / "rates.json", params)


def test_models_are_ranked_and_one_that_cannot_be_read_ends_no_other(tmp_path, capsys):
    weight = np.random.default_rng(0).normal(size=(32, 48))
    heavy = weight + 40 * np.outer(np.ones(32), np.ones(48)) / 8
    for name, array in (("noise", weight), ("heavy", heavy)):
        np.savez(tmp_path / f"{name}.npz", dense=array)
    (tmp_path / "torn.npz").write_bytes(b"PK\3\4")
    paths = [str(tmp_path / f"{name}.npz") for name in ("noise", "torn", "heavy")]
    ranking = rank_models(paths, resamples=0, randomize=False)
    assert ranking.names == (paths[2], paths[0])
    assert ranking.column("alpha")[1] == pytest.approx(farms_jax.diagnose(paths[0], resamples=0).summary()["alpha"])
    assert ranking.failed[0][0] == paths[1]
    assert "torn.npz: not measured" in capsys.readouterr().err
    assert "2 of 3 models measured" in str(ranking)
    ranking.write_json(tmp_path / "ranking.json")
    assert len(json.loads((tmp_path / "ranking.json").read_text())["layers"]) == 2
    with pytest.raises(InputError, match="no model could be measured"):
        rank_models(paths[1:2])
