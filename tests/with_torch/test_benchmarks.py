"""The benchmarks compare like with like."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import farms_jax
from benchmarks.spectral import WINDOW, exact_alphas
from benchmarks.train_step import torch_resnet
from train.resnet import ResNet


@pytest.mark.parametrize("rule", ["median", "peak"])
def test_the_loop_measures_what_we_measure(rule):
    rng = np.random.default_rng(0)
    shapes = [(20, 8, 3, 3), (8, 20, 3, 3), (16, 16, 1, 1), (30, 12), (12, 40)]
    weights = {f"w{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    theirs = exact_alphas({name: torch.from_numpy(weight) for name, weight in weights.items()}, rule)
    ours = farms_jax.analyze(weights, window=WINDOW, tail=farms_jax.Tail(rule), axes=farms_jax.TORCH_AXES)
    np.testing.assert_allclose(ours.alpha, theirs, rtol=1e-4)


@pytest.mark.parametrize("depth", [18, 50])
def test_the_networks_have_the_same_parameters(depth):
    ours = nnx.eval_shape(lambda: nnx.state(ResNet(depth, 10, 0.25, rngs=nnx.Rngs(0)), nnx.Param))
    theirs = torch_resnet(depth, 0.25).parameters()
    shapes = sorted(np.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    assert shapes == sorted(parameter.numel() for parameter in theirs)
