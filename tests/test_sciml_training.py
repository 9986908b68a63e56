"""Losses, schedules, autoregressive steps, and which layers get which rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpot_helpers import compiled

import farms_jax
from farms_jax.errors import InputError
from farms_jax.programs.epoch_loop import layer_rows
from sciml.balanced_layers import AXES, ENDS, measure, spectral_view
from sciml.config import RECIPES, SETTINGS, Config, resolve
from sciml.model import NAMED, ModelConfig, make_network
from sciml.optimizer import make_optimizer, one_cycle, schedules
from sciml.steps import TrainState, add_noise, make_evaluate, make_step, relative_l2
from sciml.training import make_refresh

MODEL = ModelConfig(
    image_size=8, patch_size=2, in_steps=3, width=16, depth=1, num_blocks=2, modes=2, out_width=8, num_classes=3
)
CONFIG = resolve(
    Config(epochs=4, batch_size=2, warmup_epochs=1, in_steps=3, rollout_steps=2, learning_rate=1e-3, noise=0.01)
)
KEY = jax.random.key(0)  # of the noise

BOTH = np.ones(2, np.float32)  # weights of two trajectories, neither of them padding

# Paper, Table 14.
RATES = {
    "tiny": {5: 2.5e-4, 10: 2.5e-4, 25: 2.5e-4, 50: 5e-4, 100: 5e-4},
    "small": {5: 1e-4, 10: 1e-4, 25: 2.5e-4, 50: 2.5e-4, 100: 2.5e-4},
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    network = make_network(MODEL)
    return network, network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def training(network):
    """A compiled step of CONFIG, and a function that gives its first state."""
    network, params = network
    optimizer = make_optimizer(CONFIG, 2)

    def start():
        return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params))

    return compiled(make_step(network, optimizer, CONFIG), start(), KEY, draw(2, 8, 8, 5, 4), BOTH), start


def oracle_l2(predicted, true, axes):
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    return (np.sqrt(((predicted - true) ** 2).sum(axes)) / np.sqrt((true**2).sum(axes))).mean(-1)


def test_relative_l2():
    predicted, true = draw(3, 5, 4, 2, 4), 3 * draw(3, 5, 4, 2, 4, seed=1)
    np.testing.assert_allclose(relative_l2(predicted, true), oracle_l2(predicted, true, (1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(relative_l2(predicted, true, axes=(1, 2)), oracle_l2(predicted, true, (1, 2)), rtol=1e-6)


def test_a_prediction_that_is_exact_or_nan():
    true = jnp.asarray(draw(2, 2, 2, 1, 1))
    value, gradient = jax.value_and_grad(lambda x: relative_l2(x, true).sum())(true)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    errors = relative_l2(true.at[1, 0, 0, 0, 0].set(jnp.nan), true)
    np.testing.assert_array_equal(errors, [0, np.nan])


def test_one_cycle_rises_falls_and_stays():
    cycle = one_cycle(steps=20, rise=5, first=1.0, middle=9.0, last=3.0)
    values = np.array([cycle(step) for step in range(25)])
    np.testing.assert_allclose(values[[0, 2, 4, 19, 24]], [1, 5, 9, 3, 3], rtol=1e-6)
    assert (np.diff(values[:5]) > 0).all()
    assert (np.diff(values[4:20]) < 0).all()


def test_step_schedule():
    config = dataclasses.replace(CONFIG, schedule="step", step_size=2, step_gamma=0.5)
    rate, beta = schedules(config, steps_per_epoch=3)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 6, 11, 12)], np.array([1, 1, 0.5, 0.5, 0.25]) * 1e-3)
    assert float(beta(7)) == pytest.approx(0.9)


def test_training_feeds_noisy_predictions_back_and_sums_over_samples(network, training):
    (network, params), (step, start) = network, training
    fields = draw(2, 8, 8, 5, 4)
    _, losses = step(start(), KEY, fields, BOTH)
    seen, predicted = fields[..., :3, :], []
    apply = compiled(jax.jit(network.apply), params, seen)
    for index in range(2):
        noisy = add_noise(jax.random.fold_in(KEY, index), seen, 0.01)
        predicted.append(np.asarray(apply(params, noisy)[0]))
        seen = np.concatenate([noisy[..., 1:, :], predicted[-1]], axis=-2)
    errors = [oracle_l2(p, fields[..., t : t + 1, :], (1, 2, 3)).sum() for t, p in enumerate(predicted, 3)]
    whole = oracle_l2(np.concatenate(predicted, axis=-2), fields[..., 3:, :], (1, 2, 3)).sum()
    np.testing.assert_allclose(losses[:2], [np.mean(errors), whole], rtol=1e-5)


def test_padding_has_no_part(training):
    step, start = training
    fields = draw(2, 8, 8, 5, 4)
    other = fields.copy()
    other[1] = 7
    weights = np.array([1, 0], np.float32)
    first, losses = step(start(), KEY, fields, weights)
    second, other_losses = step(start(), KEY, other, weights)
    np.testing.assert_array_equal(losses, other_losses)
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))


def test_the_class_head_is_left_alone_and_all_else_learns(training):
    step, start = training
    state = start()
    for _ in range(2):  # the second is at the peak of the cycle
        state, _ = step(state, KEY, draw(2, 8, 8, 5, 4), BOTH)
    after = dict(farms_jax.named_leaves(state.params))
    for name, leaf in farms_jax.named_leaves(start().params):
        assert np.array_equal(leaf, after[name]) == name.startswith("cls_head/"), name


@pytest.mark.parametrize("loss_is_finite", [False, True])
def test_a_step_that_is_not_finite_is_not_taken(training, loss_is_finite):
    step, start = training

    def state():
        state = start()
        out = state.params["out_layer"]
        out["conv2"]["kernel"] *= 1e30
        if loss_is_finite:  # nothing reaches the large kernel, but its gradient passes on
            out["conv1"] = jax.tree.map(jnp.zeros_like, out["conv1"])
        return state

    after, measured = step(state(), KEY, draw(2, 8, 8, 5, 4), BOTH)
    assert np.isfinite(measured[:2]).all() == loss_is_finite
    assert not np.isfinite(measured[2])
    assert jax.tree.all(jax.tree.map(np.array_equal, after, state()))


def test_noise_is_relative_to_the_norm_of_each_channel():
    fields = jnp.ones((2, 16, 16, 4, 3)) * jnp.array([1.0, 10.0, 0.0])
    noise = np.asarray(add_noise(KEY, fields, 0.01) - fields)
    expected = 0.01 * np.sqrt(16 * 16 * 4) * np.array([1, 10, 0])
    np.testing.assert_allclose(noise.std((0, 1, 2, 3)), expected, rtol=0.05)


def test_evaluation_feeds_back_and_cuts_the_last_bundle():
    network = make_network(dataclasses.replace(MODEL, out_steps=2))
    params, fields = network.init(jax.random.key(0)), draw(2, 8, 8, 7, 4)
    apply = compiled(jax.jit(network.apply), params, fields[..., :3, :])
    first = np.asarray(apply(params, fields[..., :3, :])[0])
    second = np.asarray(apply(params, np.concatenate([fields[..., 2:3, :], first], axis=-2))[0])
    expected = np.concatenate([first, second[..., :1, :]], axis=-2)
    config = dataclasses.replace(CONFIG, bundle=2, test_steps=3)
    whole, by_step = compiled(make_evaluate(network, config), params, fields)(params, fields)
    np.testing.assert_allclose(whole, oracle_l2(expected, fields[..., 3:6, :], (1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(by_step, oracle_l2(expected, fields[..., 3:6, :], (1, 2)), rtol=1e-5)


def layers_of(params, analyse):
    return measure(params, dataclasses.replace(CONFIG, layers=analyse), "sigmoid")


def test_reference_layers_are_torchs_linears_and_convolutions(network):
    _, params = network
    convolutions = {f"blocks/0/mlp/fc{j}/kernel" for j in (1, 2)}
    convolutions |= {"patch_embed/patches/kernel", "patch_embed/proj/kernel"}
    convolutions |= {"out_layer/conv1/kernel", "out_layer/conv2/kernel"}
    linears = {f"cls_head/fc{i}/kernel" for i in (1, 2, 3)}
    report = layers_of(params, "reference")
    few = {name for name, reason in report.left_out if reason.startswith("too ")}
    assert set(report.names) | few == convolutions | linears
    assert few <= {"cls_head/fc3/kernel", "out_layer/conv2/kernel"}
    added = set(layers_of(params, "all").names) - set(report.names)
    assert added == {"blocks/0/filter/w1", "blocks/0/filter/w2", "out_layer/deconv/kernel"}


def test_fourier_weights_have_the_singular_values_of_their_complex_blocks(network):
    _, params = network
    weight = np.asarray(params["blocks"]["0"]["filter"]["w1"], np.float64)
    blocks = weight[0] + 1j * weight[1]
    expected = np.sort(np.concatenate([np.linalg.svd(block, compute_uv=False) ** 2 for block in blocks]))
    report = farms_jax.analyze(spectral_view(params), window=None, axes=AXES, eigenvalues=True)
    found = report.eigenvalues[report.names.index("blocks/0/filter/w1")][0]
    np.testing.assert_allclose(found, 0.5 * expected, rtol=1e-4)  # kernels count half, as in the reference


def rates_of(params, tb, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    state = TrainState(params, make_optimizer(config, 2).init(params))
    state, report, scale = make_refresh(config, tb)(state)
    rows = layer_rows(report, scale, 1e-3, 0)
    return dict(farms_jax.named_leaves(state.opt_state[-1].hyperparams["lr_scale"])), rows


@pytest.mark.parametrize("tb", ["sigmoid", "farms"])
def test_rates_follow_the_sigmoid_of_alpha(network, tb):
    _, params = network
    scales, rows = rates_of(params, tb, layer_selection=False)
    alphas = {row["layer"]: row["alpha"] for row in rows}
    x = np.array(list(alphas.values())) - np.mean(list(alphas.values()))
    expected = 10 ** (1 / (1 + np.exp(-10 * x)) - 0.5)  # Table 14's scaling ratio (1, 1), slope 10
    np.testing.assert_allclose([scales[name] for name in alphas], expected, rtol=1e-4)
    assert scales["blocks/0/mlp/fc1/bias"] == scales["blocks/0/mlp/fc1/kernel"] != 1
    assert scales["pos_embed"] == scales["time_agg/w"] == scales["blocks/0/filter/w1"] == 1 != scales[ENDS[0]]
    whole = layers_of(params, "reference").to_dict()
    name = "patch_embed/proj/kernel"  # far from square, where windows and the whole matrix differ
    assert np.isclose(alphas[name], whole[name]["alpha"]) == (tb == "sigmoid")


def test_layer_selection_leaves_the_ends_alone_and_fourier_biases_follow_their_weights(network):
    _, params = network
    scales, rows = rates_of(params, "farms", layers="all")
    assert scales[ENDS[0]] == scales["patch_embed/patches/bias"] == 1
    assert {row["layer"] for row in rows} >= {ENDS[0]}  # measured all the same
    for i in (1, 2):
        assert scales[f"blocks/0/filter/b{i}"] == scales[f"blocks/0/filter/w{i}"] != 1


def test_without_tempbalance_layers_are_measured_and_rates_left_alone(network):
    scales, rows = rates_of(network[1], "none")
    assert set(map(float, scales.values())) == {1.0}
    assert all(row["alpha"] > 0 for row in rows)


def test_recipes_are_the_cells_of_the_papers_table():
    cells = [(model, percent, tb) for model in RATES for percent in RATES[model] for tb in SETTINGS]
    assert list(RECIPES) == [f"{model}-{percent}-{tb}" for model, percent, tb in cells]
    for (model, percent, tb), recipe in zip(cells, RECIPES.values(), strict=True):
        config = resolve(dataclasses.replace(recipe, data="file"))
        assert (config.model, config.ratio, config.tb) == (model, percent / 100, tb)
        assert config.learning_rate == RATES[model][percent]
        assert config.bounds() == pytest.approx((10**-0.5, 10**0.5))
        assert (config.settings(), config.in_steps, config.layer_selection) == ((tb,), 10, True)
        assert (config.resolution, NAMED[config.model].width) == (128, {"tiny": 512, "small": 1024}[model])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.5}, "--ratio is a share"),
        ({"epochs": 0}, "--epochs must be above 0"),
        ({"noise": -1.0}, "--noise must not be negative"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0"),
        ({"seeds": (1, 1)}, "--seed must be different"),
        ({"rollout_steps": 3, "bundle": 2}, "--rollout-steps 3 must be a multiple of --bundle 2"),
        ({"weights": "a", "pretrain_data": "b"}, "two ways to start"),
        ({"epochs": 2, "warmup_epochs": 3}, "--warmup-epochs 3"),
        ({"scaling": (-1.0, 1.0)}, "--scaling"),
        ({"data": ""}, "--data: the recipes"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        Config(**changes).check()
