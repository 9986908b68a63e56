"""Networks: logits, inputs of linears, attention, states; their configs are in test_prune_configs.py."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from farms_jax.errors import InputError
from prune.models import make_network
from prune.models.attention import CHUNK, CHUNKS, _attend_by_heads, _attend_in_chunks, attend
from prune.models.network import LONG
from tests.prune_helpers import DATA, FOLDERS, QWEN, config_of, numbers_of, weights_of

FORMS = [
    (name, form) for name in FOLDERS for form in ("config.json", "config.legacy.json") if (DATA / name / form).exists()
]


def state_of(network, part, tensors):
    return network.to_state(part, {name: tensors[name] for name in network.tensors(part)})


def logits_of(network, tensors, ids):
    """The whole network, block by block."""
    block = jax.jit(network.block)
    x = jax.jit(network.embed)(state_of(network, "embed", tensors), ids)
    for number in range(network.num_blocks):
        x = block(state_of(network, number, tensors), x)
    assert network.num_blocks == 0 or block._cache_size() == 1
    return np.asarray(jax.jit(network.head)(state_of(network, "head", tensors), x))


def random_tensors(network, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {name: shape for part in network.parts for name, shape in network.tensors(part).items()}
    return {name: rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_logits(name, form):
    arrays, _ = numbers_of(name)
    tensors = weights_of(name)
    network = make_network(config_of(name, form))
    network.check({key: array.shape for key, array in tensors.items()})
    logits = logits_of(network, tensors, arrays["ids"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, arrays["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "prefix"), [("llama_tiny", "model."), ("opt_tiny", "model.decoder.")])
def test_layers_are_in_the_reference_s_order(name, prefix):
    order = json.loads((DATA / f"{name}.json").read_text())["pruning"]["layer_names"]
    assert list(make_network(config_of(name)).layer_shapes()) == [f"{prefix}layers.{layer}" for layer in order]


def test_equal_networks_are_one_static_argument():
    scale = jax.jit(lambda network, x: x * network.hidden_size, static_argnums=0)
    for name, count in (("llama_tiny", 1), ("llama_tiny", 1), ("llama_tiny_tied", 2)):
        np.testing.assert_array_equal(scale(make_network(config_of(name)), jnp.ones(2)), [96, 96])
        assert scale._cache_size() == count


def test_a_network_costs_nothing_before_its_weights():
    network = make_network({
        "model_type": "llama",
        "hidden_size": 2**20,
        "intermediate_size": 2**22,
        "num_attention_heads": 2**13,
        "num_hidden_layers": 1000,
        "vocab_size": 2**20,
    })
    assert network.tensors(999)["model.layers.999.mlp.down_proj.weight"] == (2**20, 2**22)
    assert network.tensors("head") == {"model.norm.weight": (2**20,), "lm_head.weight": (2**20, 2**20)}


@pytest.mark.parametrize("name", ["llama_tiny", "opt_tiny"])
def test_linears_of_a_group_share_one_input(name):
    """Their values are compared with the reference's in test_prune_reference.py."""
    network, tensors = make_network(config_of(name)), weights_of(name)
    inputs = network.inputs(state_of(network, 0, tensors), jnp.ones((2, 9, network.hidden_size)))
    assert set(inputs) == set(network.linears)
    for group in network.input_groups:
        for linear in group:
            assert inputs[linear] is inputs[group[0]]
            assert inputs[linear].shape == (2, 9, tensors[f"{network.layer_name(0, linear)}.weight"].shape[1])


def test_long_sequences_are_independent_of_each_other():
    network, tensors = make_network(config_of("llama_tiny_rope3")), weights_of("llama_tiny_rope3")
    state = state_of(network, 0, tensors)
    x = np.random.default_rng(0).normal(size=(3, LONG, network.hidden_size)).astype(np.float32)
    for function in (jax.jit(network.block), jax.jit(network.inputs)):
        alone = [function(state, sequence[None]) for sequence in x]
        for together, *parts in zip(*map(jax.tree.leaves, (function(state, x), *alone)), strict=True):
            np.testing.assert_allclose(together, np.concatenate(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "last"), [("llama_tiny", "mlp.down_proj"), ("opt_tiny", "fc2")])
def test_inputs_do_not_compute_the_output(name, last):
    network, tensors = make_network(config_of(name)), weights_of(name)
    state, x = state_of(network, 0, tensors), jnp.zeros((2, 32, network.hidden_size))
    flops = [
        jax.jit(function).lower(state, x).compile().cost_analysis()["flops"]
        for function in (network.block, network.inputs)
    ]
    product = 2 * 2 * 32 * np.prod(network.tensors(0)[f"{network.layer_name(0, last)}.weight"])
    assert flops[0] - flops[1] > 0.95 * product


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (1, None),
        (CHUNK, 1.0),
        (CHUNK + 1, None),
        (3 * CHUNK - 1, 200.0),
        (3 * CHUNK, np.inf),
        (CHUNK * CHUNKS + 1, None),
    ],
)
def test_attention_in_chunks_is_attention(length, window):
    rng = np.random.default_rng(length)
    query = rng.normal(size=(1, length, 2, 2, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 1, length, 2, 4)).astype(np.float32)
    behind = np.arange(length)[:, None] - np.arange(length)
    seen = (behind >= 0) & (behind < (np.inf if window is None else window))
    scores = np.einsum("btkgh,bskh->bkgts", query, key) / 2
    weights = np.where(seen, np.exp(scores), 0)
    expected = np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), value)
    ours = jax.jit(attend)(query, key, value, None if window is None else jnp.float32(window))
    np.testing.assert_allclose(ours, expected.reshape(1, length, 16), rtol=1e-4, atol=1e-5)


def test_the_two_ways_to_attend_agree():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 3, 1, 200, 8))
    by_heads = jax.jit(_attend_by_heads)(query, key[:, :, 0], value[:, :, 0], 50.0)
    at_once = jax.jit(_attend_in_chunks)(query, key[:, :, 0], value[:, :, 0], 50.0)
    np.testing.assert_allclose(by_heads, at_once, rtol=1e-5, atol=1e-6)


def test_windows_by_block_take_one_compilation():
    network = make_network(QWEN)
    assert network.windows == (None, None, 3, 3)
    tensors = random_tensors(network)
    structures = {jax.tree.structure(state_of(network, part, tensors)) for part in range(4)}
    assert len(structures) == 1
    ids = np.arange(11, dtype=np.int32)[None]
    windowed = logits_of(network, tensors, ids)  # checks that there was one compilation
    full = logits_of(make_network(QWEN | {"use_sliding_window": False}), tensors, ids)
    np.testing.assert_allclose(windowed[:, :3], full[:, :3], rtol=1e-4, atol=1e-4)
    assert np.abs(windowed[:, 5:] - full[:, 5:]).max() > 1e-2


def test_state_is_a_float32_copy():
    network = make_network(config_of("llama_tiny"))
    tensors = {name: array for name, array in weights_of("llama_tiny").items() if name in network.tensors(1)}
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        given = {name: array.astype(dtype) for name, array in tensors.items()}
        expected = {name: array.astype(np.float32) for name, array in given.items()}
        state = network.to_state(1, given)
        for array in given.values():
            array[:] = 0
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
        np.testing.assert_array_equal(state["mlp.up_proj.weight"].T, expected["model.layers.1.mlp.up_proj.weight"])


def test_gradients_through_a_state():
    tensors = weights_of("opt_tiny")
    tensors = {name: tensors[name] for name in make_network(config_of("opt_tiny")).tensors(0)}
    # Another config than in the other tests, so that this network is first built while it is traced.
    network = make_network(config_of("opt_tiny", max_position_embeddings=99))
    x = np.random.default_rng(0).normal(size=(1, 5, network.hidden_size)).astype(np.float32)

    @jax.jit
    def loss(tensors):
        return jnp.square(network.block(network.to_state(0, tensors), x)).sum()

    name = "model.decoder.layers.0.fc2.bias"
    step = 0.125 * np.eye(64, dtype=np.float32)[3]
    difference = loss(tensors | {name: tensors[name] + step}) - loss(tensors | {name: tensors[name] - step})
    np.testing.assert_allclose(jax.grad(loss)(tensors)[name][3], difference / 0.25, rtol=1e-3)
    assert jax.jit(network.block)(network.to_state(0, tensors), x).shape == x.shape


def test_a_state_takes_exactly_its_tensors():
    network = make_network(config_of("llama_tiny"))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in network.tensors(0).items()}
    name = "model.layers.0.mlp.down_proj.weight"
    for wrong, message in (
        (tensors | {name: np.zeros((256, 96), np.float32)}, f"{name} is [256, 96], must be [96, 256]"),
        ({key: tensors[key] for key in tensors if key != name}, f"missing: {name}"),
        (tensors | {"model.layers.1.mlp.down_proj.weight": tensors[name]}, "model.layers.1.mlp.down_proj.weight"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            network.to_state(0, wrong)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("opt_tiny", "model.decoder.", "decoder."),
        ("opt_tiny_postnorm", "model.decoder.", "decoder."),
        ("llama_tiny_tied", "model.", ""),
    ],
)
def test_names_with_another_prefix(name, old, new):
    arrays, _ = numbers_of(name)
    tensors = {key.replace(old, new): array for key, array in weights_of(name).items()}
    network = make_network(config_of(name), tensors)
    network.check({key: array.shape for key, array in tensors.items()})
    assert f"{network.layer_name(0, network.linears[0])}.weight" in tensors
    np.testing.assert_allclose(logits_of(network, tensors, arrays["ids"]), arrays["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_tiny", "opt_tiny"])
def test_a_sequence_longer_than_the_positions(name):
    network = make_network(config_of(name))
    state = state_of(network, "embed", weights_of(name))
    ids = jnp.zeros((1, network.max_length), jnp.int32)
    assert np.isfinite(network.embed(state, ids)).all()
    with pytest.raises(InputError, match=f"takes {network.max_length} at most"):
        network.embed(state, jnp.zeros((1, network.max_length + 1), jnp.int32))
