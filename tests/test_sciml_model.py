"""DPOT against the numbers of its public PyTorch code, and its parts against NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax.errors import InputError
from sciml.checkpoints import from_torch, to_torch
from sciml.fourier import from_kept_modes, kept_modes
from sciml.model import NAMED, _statistics, make_network
from sciml.modules import ACTIVATIONS
from tests.dpot_helpers import SETTINGS, SMALL, arrays_of, below, compiled, config_of, state_of
from tests.helpers import few


@pytest.fixture(scope="module", params=few(SETTINGS, 2))
def case(request):
    """Stored arrays of a reference model; ours with its weights: loss, outputs, gradients by Torch's names."""
    config, arrays = config_of(request.param), arrays_of(request.param)
    network = make_network(config)

    def step(params):
        def loss(params):
            y, logits = network.apply(params, arrays["x"])
            return jnp.square(y).mean() + 0.1 * jnp.square(logits).mean(), (y, logits)

        return jax.value_and_grad(loss, has_aux=True)(params)

    params = from_torch(state_of(request.param), config)
    (loss, outputs), gradients = compiled(jax.jit(step), params)(params)
    return arrays, loss, outputs, to_torch(gradients, config)


def test_outputs_are_the_references(case):
    arrays, _, (y, logits), _ = case
    np.testing.assert_allclose(y, arrays["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, arrays["cls_pred"], rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_are_the_references(case):
    arrays, loss, _, gradients = case
    np.testing.assert_allclose(loss, arrays["grad_loss"], rtol=1e-5)
    expected = below("grad_norm/", arrays)
    assert gradients.keys() == expected.keys()
    for name, norm in expected.items():
        assert norm > 1e-6  # a gradient that is there
        np.testing.assert_allclose(np.linalg.norm(gradients[name]), norm, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "published"), [("tiny", "7M"), ("small", "30M"), ("medium", "122M"), ("large", "509M"), ("huge", "1.03B")]
)
def test_named_models_have_the_published_sizes(name, published):
    skeleton = jax.eval_shape(make_network(NAMED[name]).init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(skeleton))
    assert published == (f"{count / 1e9:.2f}B" if count >= 1e9 else f"{int(count / 1e6)}M")


@pytest.mark.parametrize(("size", "modes"), [((8, 8), 5), ((6, 9), 3), ((5, 4), 32), ((1, 1), 1)])
def test_transforms_are_numpys(size, modes):
    size_x, size_y = size
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, size_x, size_y, 3))
    expected = np.fft.rfft2(x, axes=(1, 2), norm="ortho")[:, :modes, :modes]
    z = kept_modes(jnp.asarray(x, jnp.float32), modes)
    np.testing.assert_allclose(z[..., 0, :] + 1j * z[..., 1, :], expected, atol=1e-5)

    # A spectrum of no real field: modes 0 and Y / 2 have imaginary parts.
    spectrum = draw.standard_normal(expected.shape) + 1j * draw.standard_normal(expected.shape)
    filled = np.zeros((2, size_x, size_y // 2 + 1, 3), complex)
    filled[:, : expected.shape[1], : expected.shape[2]] = spectrum
    parts = jnp.asarray(np.stack([spectrum.real, spectrum.imag], axis=3), jnp.float32)
    back = np.fft.irfft2(filled, s=size, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(from_kept_modes(parts, size_x, size_y), back, atol=1e-5)


def test_gelu_is_the_exact_one():
    x = np.linspace(-9, 9, 2001)
    expected = [value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.asarray(x, jnp.float32)), expected, atol=1e-6)


def test_initial_values():
    config = dataclasses.replace(SMALL, width=64, normalize=True, out_width=16)
    params = make_network(config).init(jax.random.key(0))
    assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["time_agg"]["w"]) == pytest.approx(1 / (3 * math.sqrt(64)), rel=0.05)
    np.testing.assert_allclose(np.log2(params["time_agg"]["gamma"]), np.linspace(-10, 10, 64), atol=1e-4)
    fan_ins = {  # of the transposed convolution Torch takes its outputs
        ("patch_embed", "patches"): 2 * 2 * 7,
        ("patch_embed", "proj"): 11,
        ("blocks", "1", "mlp", "fc1"): 64,
        ("scale_mu",): 8,
        ("cls_head", "fc3"): 64,
        ("out_layer", "deconv"): 2 * 2 * 16,
        ("out_layer", "conv1"): 16,
    }
    for path, fan_in in fan_ins.items():
        node = params
        for key in path:
            node = node[key]
        for leaf in node.values():
            assert np.abs(leaf).max() <= 1 / math.sqrt(fan_in)
        assert np.abs(node["kernel"]).max() > 0.9 / math.sqrt(fan_in)
        assert np.mean(node["kernel"]) == pytest.approx(0, abs=0.2 / math.sqrt(fan_in))
    for leaf in params["blocks"]["0"]["filter"].values():  # from [0, 1 / block size^2)
        assert 0 <= leaf.min() <= 0.1 / 32**2
        assert 0.9 / 32**2 <= leaf.max() <= 1 / 32**2
    np.testing.assert_array_equal(params["blocks"]["0"]["norm1"]["scale"], 1)


def test_a_constant_channel_has_gradients():
    fields = np.random.default_rng(0).standard_normal((2, 8, 8, 3, 4), dtype=np.float32)
    fields[..., 2] = 1.5
    assert np.isfinite(jax.grad(lambda x: sum(part.sum() for part in _statistics(x)))(fields)).all()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 8, 8, 4, 4), (2, 8, 8, 3, 5), (2, 16, 8, 3, 4)])
def test_fields_of_another_shape(shape):
    network = make_network(SMALL)
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(InputError) as error:
        jax.eval_shape(network.apply, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert "(batch, 8, 8, 3, 4)" in str(error.value)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 24, "num_blocks": 5}, "width: must be divisible by num_blocks, 5; got 24"),
        ({"width": 12, "num_blocks": 2}, "width: must be divisible by the groups of its norms, 8; got 12"),
        ({"image_size": 9}, "image_size: must be divisible by patch_size 2, got 9"),
        ({"depth": 0}, "depth: must be an integer of at least 1, got 0"),
        ({"modes": 2.5}, "modes: must be an integer of at least 1, got 2.5"),
        ({"mlp_ratio": 0.01}, "mlp_ratio: must give the MLP at least one channel"),
        ({"activation": "swish"}, "activation: must be one of gelu, .*; got 'swish'"),
        ({"time_aggregation": "mean"}, "time_aggregation: must be one of mlp, exp_mlp; got 'mean'"),
        ({"normalize": True, "out_channels": 2}, r"normalize: .* out_channels \(2\) must be in_channels \(4\)"),
    ],
)
def test_configurations_that_no_model_has(change, message):
    with pytest.raises(InputError, match=message):
        make_network(dataclasses.replace(SMALL, **change))
