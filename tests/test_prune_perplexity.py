"""Perplexity against logits, however sequences are batched, and while pruning."""

import ml_dtypes
import numpy as np
import pytest
from prune_helpers import DATA, card_of, numbers_of, small_run, weights_of, write_folder

import prune.forward
import prune.perplexity
from prune.checkpoints import open_checkpoint
from prune.job import prepare
from prune.perplexity import perplexity
from prune.run import run


@pytest.fixture
def dense():
    """Network and checkpoint, ids, and their perplexity."""
    model, ids = opened(DATA / "llama_tiny"), numbers_of("llama_tiny")[0]["ids"]
    return model, ids, perplexity(*model, ids)


def opened(folder):
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.network(), checkpoint


def losses_of(logits, ids):
    """Loss of each sequence in float64: log of the sum over the vocabulary, less the next token's logit."""
    logits = logits[:, :-1].astype(np.float64)
    highest = logits.max(-1)
    log_sum = highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
    return (log_sum - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]).mean(1)


@pytest.mark.parametrize("model", ["llama_tiny", "opt_tiny"])
def test_perplexity_is_that_of_the_reference_s_logits(model):
    arrays, numbers = numbers_of(model)
    found, expected = perplexity(*opened(DATA / model), arrays["ids"]), losses_of(arrays["logits"], arrays["ids"])
    np.testing.assert_allclose(found.nll, expected, rtol=1e-4)
    assert found.value == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    if model.startswith("llama"):  # those for which the fixture has it
        assert np.mean(found.nll) == pytest.approx(numbers["loss_mean"], rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 80], ids=["one by one", "two and one"])
def test_batches_change_nothing(tokens, dense, tmp_path, monkeypatch):
    model, ids, expected = dense
    monkeypatch.setattr(prune.forward, "TOKENS", tokens)
    found = perplexity(*model, ids)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)
    assert perplexity(*model, ids, spill=tmp_path).nll == found.nll


def test_logits_of_a_few_tokens_at_a_time_change_nothing(dense, monkeypatch):
    model, ids, expected = dense
    monkeypatch.setattr(prune.perplexity, "_LOGITS", 7 * 256)
    prune.perplexity.token_losses.clear_cache()
    try:
        found = perplexity(*model, ids)
    finally:
        prune.perplexity.token_losses.clear_cache()
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)


@pytest.mark.slow
def test_pruning_on_the_way_is_pruning_and_then_evaluating(tmp_path):
    """The uniform baseline, which writes no model, beside the same run that does; weights are rounded in both."""
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights_of("llama_tiny").items()}
    source = write_folder(tmp_path / "source", tensors)
    job = prepare(small_run(tmp_path, source, method="sparsegpt", allocation="uniform", baseline="uniform"))
    text = run(job)
    card = card_of(job.path)
    assert card["baseline_sparsity"]["uniform"] == card["sparsity"]["reached"]
    np.testing.assert_allclose(card["nll_per_block"]["uniform"], card["nll_per_block"]["pruned"], rtol=1e-6)
    assert card["nll_per_block"]["uniform"] != card["nll_per_block"]["dense"]
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line and line[0] in {"dense", "uniform"}] == ["dense", "uniform", "uniform"]
