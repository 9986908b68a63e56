"""The PyTorch pruning that ours is timed against does what the reference does."""

import json

import numpy as np
import pytest
import torch
from helpers import load_cases
from prune_helpers import DATA, weights_of

from benchmarks.torch_prune import LINEARS, TorchBlock, prune_block

CONFIG = json.loads((DATA / "llama_tiny" / "config.json").read_text())
NM = {"2_4": (2, 4), "4_8": (4, 8)}


@pytest.fixture(scope="module")
def reference():
    return load_cases("llama_tiny")


@pytest.fixture(scope="module")
def dense():
    return weights_of("llama_tiny")


def embedded(ids, dense):
    return [torch.from_numpy(dense["model.embed_tokens.weight"][row][None]) for row in ids]


def ratios_of(tag, reference, block) -> float | dict[str, float]:
    settings, arrays = reference
    if not tag.endswith("_farms"):
        return settings["pruning"]["sparsity"]
    ratios = arrays["prune/ratios"].reshape(-1, len(LINEARS))[block]
    return {name: float(ratio) for name, ratio in zip(LINEARS, ratios, strict=True)}


def pruned_model(tag, reference, dense):
    """All blocks in order, each given the outputs of the pruned ones before it."""
    xs = embedded(reference[1]["calib_ids"], dense)
    method, _, rest = tag.partition("_")
    blocks = []
    for number in range(CONFIG["num_hidden_layers"]):
        blocks.append(TorchBlock(CONFIG, dense, number))
        xs = prune_block(blocks[-1], xs, method, ratios_of(tag, reference, number), NM.get(rest))
    return blocks


def logits_of(blocks, ids, dense):
    (x,) = embedded(ids, dense)
    with torch.inference_mode():
        for block in blocks:
            x = block(x)
        weight = torch.from_numpy(dense["model.norm.weight"])
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, CONFIG["rms_norm_eps"])
        return (x @ torch.from_numpy(dense["lm_head.weight"]).T).numpy()


def test_the_dense_blocks_are_the_references(reference, dense):
    blocks = [TorchBlock(CONFIG, dense, number) for number in range(CONFIG["num_hidden_layers"])]
    logits = logits_of(blocks, reference[1]["llama_tiny/ids"][:1], dense)
    np.testing.assert_allclose(logits, reference[1]["llama_tiny/logits"][:1], atol=1e-4)


MASKS = ["magnitude_uniform", "magnitude_farms", "wanda_uniform", "wanda_farms", "wanda_2_4", "wanda_4_8"]


@pytest.mark.parametrize("tag", [*MASKS, "sparsegpt_farms", "sparsegpt_2_4"])
def test_weights_are_the_references(tag, reference, dense):
    blocks, arrays, other_rows = pruned_model(tag, reference, dense), reference[1], 0
    for number, block in enumerate(blocks):
        for name in LINEARS:
            weight, layer = block.get_parameter(f"{name}.weight").detach().numpy(), f"{number}.{name}"
            if tag in MASKS:
                expected = np.where(arrays[f"prune/{tag}/keep/{layer}"], dense[f"model.layers.{layer}.weight"], 0)
                np.testing.assert_array_equal(weight, expected, err_msg=layer)
            else:
                # A near tie that rounding decides (2:4 has one, in the last layer) changes the rest of its row.
                expected = arrays[f"prune/{tag}/weight/{layer}"]
                same = ((weight == 0) == (expected == 0)).all(axis=1)
                other_rows += np.sum(~same)
                np.testing.assert_allclose(weight[same], expected[same], atol=2e-5, err_msg=layer)
    assert other_rows <= 2
    logits = logits_of(blocks, arrays["llama_tiny/ids"][:1], dense)
    atol = 1e-4 if tag in MASKS else 2e-2 if other_rows else 2e-4
    np.testing.assert_allclose(logits, arrays[f"prune/{tag}/logits"], atol=atol)


def test_without_outputs_nothing_but_the_weights_changes(reference, dense):
    xs = embedded(reference[1]["calib_ids"][:2], dense)
    block, other = TorchBlock(CONFIG, dense, 0), TorchBlock(CONFIG, dense, 0)
    assert prune_block(block, xs, "wanda", 0.5, outputs=False) == []
    assert len(prune_block(other, xs, "wanda", 0.5)) == len(xs)
    for name, weight in block.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=0, atol=0)
