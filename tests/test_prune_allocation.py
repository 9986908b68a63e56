"""Sparsities of a run: scores, budgets, N:M, and the search of epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few
from prune_helpers import bytes_of, card_of, small_run, state_of

import prune.run
from farms_jax import block_of
from prune.allocation import sparsities
from prune.checkpoints import open_checkpoint
from prune.job import prepare
from prune.output import read_masks
from prune.perplexity import perplexity
from prune.run import run
from prune.scores import score_layers


def run_of(config):
    """Card and run directory of a run."""
    job = prepare(config)
    run(job)
    return card_of(job.path), job.path


def allocated(folder, *, epsilon, **settings):
    """Scores of blocks and their sparsities, without pruning."""
    job = prepare(small_run(folder, method="magnitude", **settings))
    scores, shapes = score_layers(job), job.network.layer_shapes()
    found = sparsities(job.config, scores, shapes, epsilon)
    blocks = {block_of(layer): [other for other in shapes if block_of(other) == block_of(layer)] for layer in shapes}
    return (np.array([np.mean([values[n] for n in names]) for names in blocks.values()]) for values in (scores, found))


def mean_of(rows):
    """Mean sparsity over the weights of layers, rows of a card."""
    return np.average([row["sparsity"] for row in rows], weights=[row["weights"] for row in rows])


# --- Scores ----------------------------------------------------------------------------------------------------------


def wanda_scores(job):
    """|W| times the norm of the input of every layer of the dense model, in float64."""
    network, tensors = job.network, {name: job.checkpoint.read(name) for name in job.checkpoint.tensors}
    inputs_of, apply = jax.jit(network.inputs), jax.jit(network.block)
    x, scores = network.embed(state_of(network, "embed", tensors), jnp.asarray(job.seen)), {}
    for block in range(network.num_blocks):
        state = state_of(network, block, tensors)
        inputs = inputs_of(state, x)
        for linear in network.linears:
            layer = network.layer_name(block, linear)
            seen = np.asarray(inputs[linear], np.float64)
            norm = np.sqrt((seen**2).sum(1).mean(0))  # over tokens, then the mean over sequences
            scores[layer] = np.abs(tensors[f"{layer}.weight"].astype(np.float64)) * norm
        x = apply(state, x)
    return scores


@pytest.mark.parametrize("model", few(["llama_tiny", "opt_tiny"], 2))
def test_scores_of_owl_and_dlp(model, tmp_path):
    jobs = {
        (name, by): prepare(small_run(tmp_path, model, allocation=name, granularity=by, method="magnitude"))
        for name in ("owl", "dlp")
        for by in ("block", "layer")
    }
    expected, found = wanda_scores(jobs["owl", "block"]), {key: score_layers(job) for key, job in jobs.items()}
    for layer in expected:
        block = [other for other in expected if block_of(other) == block_of(layer)]
        for by, layers in (("block", block), ("layer", [layer])):
            together = np.concatenate([expected[other].ravel() for other in layers])
            # Up to two scores may be so near to five times the mean that rounding decides.
            share = (together > 5 * together.mean()).mean()
            assert found["owl", by][layer] == pytest.approx(-100 * share, abs=201 / together.size)
            middle = np.sort(together)[(together.size - 1) // 2]
            assert found["dlp", by][layer] == pytest.approx(middle, rel=1e-5)
    for scores in found.values():
        assert list(scores) == list(jobs["owl", "block"].network.layer_shapes())
    counts = [len({round(value, 9) for value in found["dlp", by].values()}) for by in ("block", "layer")]
    assert counts == [jobs["owl", "block"].network.num_blocks, len(expected)]


@pytest.mark.parametrize("allocation", ["owl", "dlp"])
def test_sparsities_of_owl_and_dlp(allocation, tmp_path):
    """The published rule: shares to keep, stretched to twice epsilon, moved to the mean that is asked for."""
    scores, found = allocated(tmp_path, allocation=allocation, sparsity=0.6, epsilon=0.1)
    keep = -scores if allocation == "owl" else 1 - scores / scores.sum()
    keep = (keep - keep.min()) / (keep.max() - keep.min()) * 2 * 0.1
    np.testing.assert_allclose(found, 1 - (keep - keep.mean() + (1 - 0.6)), atol=1e-6)
    assert found.max() - found.min() == pytest.approx(0.2)


def test_atp_is_an_arithmetic_progression(tmp_path):
    _, found = allocated(tmp_path, allocation="atp", sparsity=0.7, epsilon=0.12)
    np.testing.assert_allclose(found, [0.58, 0.66, 0.74, 0.82], atol=1e-9)


def test_ends_lose_less_and_all_others_the_same(tmp_path):
    _, found = allocated(tmp_path, allocation="ends", sparsity=0.7, epsilon=0.12)
    np.testing.assert_allclose(found, [0.58, 0.82, 0.82, 0.58], atol=1e-9)
    _, found = allocated(tmp_path, allocation="ends", sparsity=0.1, epsilon=0.13)
    np.testing.assert_allclose(found, [0, 0.2, 0.2, 0], atol=1e-9)


@pytest.mark.parametrize("allocation", ["farms", "alphapruning"])
def test_alphas_are_stretched_around_one_and_scaled_to_the_budget(allocation, tmp_path):
    alphas, found = allocated(tmp_path, allocation=allocation, epsilon=0.4)
    relative = 0.6 + 0.8 * (alphas - alphas.min()) / (alphas.max() - alphas.min())
    np.testing.assert_allclose(found, 0.5 * relative / relative.mean(), atol=1e-9)


# --- Budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", few(["layer", "block"], 2))
def test_the_budget_is_met_exactly_and_reached_to_the_method_s_rounding(granularity, tmp_path):
    # So high that some layers would lose more than all.
    settings = {"granularity": granularity, "sparsity": 0.85, "epsilon": "0.5"}
    card, path = run_of(small_run(tmp_path, method="magnitude", **settings))
    rows, masks = card["allocation"]["layers"], read_masks(path)
    assert mean_of(rows) == pytest.approx(0.85, abs=1e-9)
    assert max(row["sparsity"] for row in rows) == pytest.approx(0.998)
    for block in {row["block"] for row in rows}:
        asked = {row["sparsity"] for row in rows if row["block"] == block}
        assert len(asked) == 1 if granularity == "block" else len(asked) > 1
    for row in rows:  # one more than asked, and those equal to the last
        asked = int(row["weights"] * row["sparsity"])
        assert asked < (~masks[row["layer"]]).sum() <= asked + 3
    assert card["sparsity"]["asked"] == 0.85
    assert card["sparsity"]["reached"] == pytest.approx(0.85, abs=3 * len(rows) / sum(masks[m].size for m in masks))

    # Wanda takes whole numbers from every row: as near as they come to the same.
    card, path = run_of(small_run(tmp_path, method="wanda", **settings))
    masks = read_masks(path)
    for row, exact in zip(card["allocation"]["layers"], rows, strict=True):
        _, inputs = masks[row["layer"]].shape
        removed = set((~masks[row["layer"]]).sum(1).tolist())
        assert removed == {round(inputs * row["sparsity"])}
        assert abs(row["sparsity"] - exact["sparsity"]) < 2 / inputs  # its rounding, and what full layers leave
    rounding = max(mask.shape[0] for mask in masks.values()) / 2 / sum(mask.size for mask in masks.values())
    assert mean_of(card["allocation"]["layers"]) == pytest.approx(0.85, abs=rounding)
    assert card["sparsity"]["reached"] == pytest.approx(0.85, abs=rounding)


def test_the_reference_s_budget_removes_less(tmp_path):
    _, found = allocated(tmp_path, sparsity=0.85, epsilon=0.5, budget="reference")
    assert found.max() == pytest.approx(0.998)
    assert found.mean() < 0.845  # blocks are of one size


# --- N:M -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", few(["wanda", "magnitude", "sparsegpt"], 3))
def test_uniform_groups_have_exactly_n_of_m(method, tmp_path):
    card, path = run_of(small_run(tmp_path, method=method, allocation="uniform", groups="2:4"))
    for layer, mask in read_masks(path).items():
        assert ((~mask).reshape(-1, 4).sum(1) == 2).all(), layer
    assert card["sparsity"] == {"asked": 0.5, "reached": 0.5}


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_mixed_groups_share_one_budget(granularity, tmp_path):
    card, path = run_of(small_run(tmp_path, granularity=granularity, groups="4:8", sparsity=0.45, epsilon="0.4"))
    rows, masks = card["allocation"]["layers"], read_masks(path)
    for row in rows:
        count, size = map(int, row["groups"].split(":"))
        assert size == 8
        assert row["sparsity"] == count / 8
        assert ((~masks[row["layer"]]).reshape(-1, 8).sum(1) == count).all(), row["layer"]
    mean = mean_of(rows)
    assert mean == card["sparsity"]["reached"]
    assert len({row["sparsity"] for row in rows}) > 2
    # Half a step, of 1/8, of the largest unit that has one N.
    weights = sum(row["weights"] for row in rows)
    unit = weights / 4 if granularity == "block" else max(row["weights"] for row in rows)
    assert abs(mean - 0.45) <= unit / weights / 16 + 1e-9


# --- Search of epsilon -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_takes_the_epsilon_of_the_lowest_perplexity_on_held_out_text(tmp_path):
    config = small_run(tmp_path, epsilon="auto")
    card, path = run_of(config)
    found = card["allocation"]["epsilon"]
    assert set(found["trials"]) == {"0.0", "0.1", "0.2", "0.3", "0.4", "0.5"}
    assert found["value"] == float(min(found["trials"], key=found["trials"].get))
    assert len(set(found["trials"].values())) == 6
    # The same as with that number given, and the trial is what the model that was written gives on the held-out text.
    _, other = run_of(small_run(tmp_path, epsilon=str(found["value"])))
    written, again = bytes_of(path / "model"), bytes_of(other / "model")
    for files in (written, again):
        del files["README.md"]  # it has the command
    assert again == written
    job = prepare(config)
    assert (card["calibration"]["count"], len(job.seen), len(job.unseen)) == (10, 8, 2)
    value = perplexity(job.network, open_checkpoint(str(path / "model")), job.unseen).value
    assert found["trials"][str(found["value"])] == pytest.approx(value, rel=1e-6)


def test_statistics_never_see_the_held_out_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prune.run, "EPSILONS_SHIFT", (0.1,))
    config = small_run(tmp_path, allocation="owl", epsilon="auto")
    ids = np.load(tmp_path / "calibration.npy").ravel()[:400].reshape(10, 40)
    np.save(tmp_path / "calibration.npy", ids)
    first, path = run_of(config)
    ids[8:] = (ids[8:] * 7 + 3) % 256
    np.save(tmp_path / "calibration.npy", ids)
    second, other = run_of(config)
    assert path != other
    assert first["allocation"]["epsilon"]["trials"] != second["allocation"]["epsilon"]["trials"]
    assert first["allocation"]["layers"] == second["allocation"]["layers"]
    assert bytes_of(path / "model") == bytes_of(other / "model")


def test_uniform_needs_no_held_out_text(tmp_path):
    config = small_run(tmp_path, allocation="uniform", epsilon="auto", length=64)
    assert prepare(config).unseen.size == 0
