"""The image networks against torch's numbers (`data/cnn_forward.npz`), and their layers against plain JAX."""

import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import few

from tests.torch_weights import from_torch, leaves, load
from train import cpu_gradients, resnet
from train.models import MODELS

DATA = Path(__file__).parent / "data"
FIXTURES = {"resnet18_w0.125": ("resnet18", 0.125), "vgg16_w0.25": ("vgg16", 0.25)}


@pytest.fixture(scope="module", params=FIXTURES)
def case(request):
    """Everything of one fixture network: its arrays, its numbers, and our network with its weights."""
    with np.load(DATA / "cnn_forward.npz") as file:
        prefix = f"{request.param}/"
        arrays = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    name, width = FIXTURES[request.param]
    model = nnx.eval_shape(lambda: MODELS[name].build(num_classes=10, width=width, rngs=nnx.Rngs(0)))
    load(model, from_torch(name, state))
    arrays["x"] = arrays["x"].transpose(0, 2, 3, 1)
    numbers = json.loads((DATA / "cnn_forward.json").read_text())[request.param]
    return name, model, arrays, numbers


@pytest.fixture(scope="module")
def trained(case):
    """Loss, logits, gradients and running statistics of one training step."""
    _, model, arrays, _ = case
    graph, params, stats = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(params, stats, x, y):
        model = nnx.merge(graph, params, stats, copy=True)
        model.train()
        logits = model(x)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
        return loss, (logits, nnx.state(model, nnx.BatchStat))

    (loss, (logits, stats)), gradients = step(params, stats, arrays["x"], arrays["y"])
    return loss, logits, leaves(gradients), leaves(stats)


def torch_name(name):
    endings = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    module, _, leaf = name.rpartition("/")
    return f"{module}/{endings[leaf]}".replace("/", ".")


def test_logits_in_eval_mode(case):
    _, model, arrays, numbers = case
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == numbers["num_params"]
    logits = nnx.jit(lambda model, x: model(x))(nnx.view(model, use_running_average=True), arrays["x"])
    np.testing.assert_allclose(logits, arrays["logits_eval"], rtol=1e-4, atol=1e-4)


def test_logits_and_loss_in_train_mode(case, trained):
    _, _, arrays, numbers = case
    loss, logits, _, _ = trained
    np.testing.assert_allclose(logits, arrays["logits_train"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, numbers["loss_train"], rtol=1e-4)


def test_gradients(case, trained):
    _, _, arrays, _ = case
    gradients = trained[2]
    expected = {key.removeprefix("grad_norm/"): arrays[key] for key in arrays if key.startswith("grad_norm/")}
    norms = {torch_name(name): np.linalg.norm(gradient) for name, gradient in gradients.items()}
    assert norms.keys() == expected.keys()
    # A bias before a batch norm has no effect, its gradient is rounding: 1e-6 of the others'.
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_running_statistics_after_a_step(case, trained):
    _, _, arrays, _ = case
    statistics = trained[3]
    expected = {key for key in arrays if key.startswith("after_train_step/") and "num_batches" not in key}
    assert {f"after_train_step/{torch_name(name)}" for name in statistics} == expected
    for name, value in statistics.items():
        key = f"after_train_step/{torch_name(name)}"
        np.testing.assert_allclose(value, arrays[key], rtol=1e-5, atol=1e-5, err_msg=name)


def test_rules_on_names(case):
    name, model, _, _ = case
    architecture = MODELS[name]
    names = list(leaves(nnx.state(model, nnx.Param)))
    first = {"resnet18": "conv1/kernel", "vgg16": "features/conv_1/kernel"}[name]
    excluded = {n for n in names if any(re.fullmatch(rule, n) for rule in architecture.exclude)}
    assert excluded == {first, "linear/kernel"}

    norms = {n for n in names if n.endswith("/scale")} | {n.replace("/scale", "/bias") for n in names if "/scale" in n}
    shortcuts = {n for n in norms if "shortcut" in n}
    assert bool(shortcuts) == (name == "resnet18")
    for rules, covered in ((architecture.follow, norms - shortcuts), (architecture.follow_order, norms)):
        targets = {}
        for n in names:
            matches = [(m, template) for rule, template in rules.items() if (m := re.fullmatch(rule, n))]
            assert len(matches) <= 1
            for match, template in matches:
                targets[n] = match.expand(template)
        assert targets.keys() == covered
        assert set(targets.values()) <= set(names)
        # Each norm stands behind a kernel with as many outputs.
        flat = leaves(model)
        assert all(flat[n].shape[0] == flat[target].shape[-1] for n, target in targets.items())


@pytest.mark.parametrize(("name", "num_params"), [("resnet50", 23_705_252), ("vgg19", 20_086_692)])
def test_deeper_networks(name, num_params):
    """Their parameters are as many as those of the same networks in PyTorch."""

    def build_and_run(x):
        model = MODELS[name].build(num_classes=100, rngs=nnx.Rngs(0))
        return model(x), nnx.state(model, nnx.Param)

    logits, params = jax.eval_shape(build_and_run, jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 100)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == num_params


@pytest.mark.slow
def test_bottlenecks_in_bfloat16_keep_float32_parameters(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 50, (1, 1, 1, 1))
    model = MODELS["resnet50"].build(num_classes=10, width=0.0625, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 32, 32, 3)))
    assert logits.dtype == jnp.bfloat16
    assert np.isfinite(logits.astype(jnp.float32)).all()
    assert all(leaf.dtype == jnp.float32 for leaf in leaves(model).values())


@pytest.mark.parametrize("name", few(["resnet18", "vgg16"], 2))
def test_initial_values(name):
    parameters = leaves(nnx.state(MODELS[name].build(num_classes=10, width=0.5, rngs=nnx.Rngs(0)), nnx.Param))
    for path, value in parameters.items():
        module, _, leaf = path.rpartition("/")
        if f"{module}/kernel" not in parameters:
            np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0)
            continue
        bound = 1 / math.sqrt(math.prod(parameters[f"{module}/kernel"].shape[:-1]))
        assert np.abs(value).max() <= bound
        if leaf == "kernel":  # enough values for the whole range to be met, evenly
            assert np.abs(value).max() > 0.97 * bound
            np.testing.assert_allclose(np.std(value), bound / math.sqrt(3), rtol=0.05)


@pytest.mark.parametrize(("stride", "size", "side"), [(1, 1, 8), (1, 3, 7), (2, 1, 7), (2, 3, 8)])
def test_convolution_equals_plain_one(stride, size, side):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, side, side, 5))
    kernel = jax.random.normal(keys[1], (size, size, 5, 6))
    y, pull = jax.vjp(partial(cpu_gradients.conv2d, stride=stride), x, kernel)
    expected, plain_pull = jax.vjp(partial(cpu_gradients.plain_conv2d, stride=stride), x, kernel)
    np.testing.assert_array_equal(y, expected)
    dy = jax.random.normal(keys[2], y.shape)
    for written_out in (pull(dy), cpu_gradients.conv2d_gradients(x, kernel, dy, stride=stride)):
        for gradient, plain in zip(written_out, plain_pull(dy), strict=True):
            np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_batch_norm_gradient_equals_plain_one():
    keys = jax.random.split(jax.random.key(0), 4)
    x = 3 + 2 * jax.random.normal(keys[0], (4, 5, 6, 7))
    scale, bias = jax.random.normal(keys[1], (2, 7))

    def plain(x, scale, bias):
        return scale * (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + cpu_gradients.EPSILON) + bias

    y, pull = jax.vjp(lambda *inputs: cpu_gradients.batch_norm(*inputs)[0], x, scale, bias)
    expected, plain_pull = jax.vjp(plain, x, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dy = jax.random.normal(keys[3], y.shape)
    for gradient, plain_gradient in zip(pull(dy), plain_pull(dy), strict=True):
        np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-5, atol=1e-4)


def test_two_ways_to_sum_agree():
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 5, 6, 7))

    def term(a, b):
        return a, a * b

    by_rows, at_once = cpu_gradients.sums_by_rows(term, a, b), cpu_gradients.sums_at_once(term, a, b)
    np.testing.assert_allclose(by_rows, at_once, rtol=1e-5, atol=1e-5)


def test_compiler_options_are_accepted():
    np.testing.assert_array_equal(jax.jit(jnp.sin, compiler_options=cpu_gradients.compiler_options())(0.0), 0.0)
