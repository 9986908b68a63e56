"""Networks: logits, inputs of linears, attention, states; their configs are in test_prune_configs.py."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from farms_jax.errors import InputError
from prune.models import make_network
from prune.models.network import LONG
from prune.models.operations import CHUNK, CHUNKS, _attend_by_heads, _attend_in_chunks, attend
from tests.prune_helpers import DATA, FOLDERS, QWEN, config_of, logits_of, numbers_of, state_of, weights_of


@pytest.mark.parametrize("name", FOLDERS)
def test_logits(name):
    arrays, _ = numbers_of(name)
    tensors = weights_of(name)
    network = make_network(config_of(name))
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
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 2**20) | {"num_hidden_layers": 1000}
    network = make_network({"model_type": "llama", "num_attention_heads": 2**13, **sizes})
    assert network.tensors(999)["model.layers.999.mlp.down_proj.weight"] == (2**20, 2**20)


@pytest.mark.parametrize("name", ["llama_tiny", "opt_tiny"])
def test_linears_of_a_group_share_one_input(name):
    """Their values are compared with the reference's in test_prune_reference.py."""
    network, tensors = make_network(config_of(name)), weights_of(name)

    def look(state, x):
        inputs = network.inputs(state, x)
        assert all(inputs[linear] is inputs[group[0]] for group in network.input_groups for linear in group)
        return inputs

    found = jax.eval_shape(look, state_of(network, 0, tensors), jnp.ones((2, 9, network.hidden_size)))
    columns = {linear: tensors[f"{network.layer_name(0, linear)}.weight"].shape[1] for linear in network.linears}
    assert {linear: array.shape for linear, array in found.items()} == {n: (2, 9, size) for n, size in columns.items()}


def test_long_sequences_are_independent_of_each_other():
    network, tensors = make_network(config_of("llama_tiny_rope3")), weights_of("llama_tiny_rope3")
    state, inputs = state_of(network, 0, tensors), jax.jit(network.inputs)
    x = np.random.default_rng(0).normal(size=(3, LONG, network.hidden_size)).astype(np.float32)
    together, alone = inputs(state, x), [inputs(state, sequence[None]) for sequence in x]
    for name, array in together.items():
        parts = np.concatenate([one[name] for one in alone])
        np.testing.assert_allclose(array, parts, rtol=1e-4, atol=1e-4)


def test_inputs_do_not_compute_the_output():
    network, tensors = make_network(config_of("llama_tiny")), weights_of("llama_tiny")
    state, x = state_of(network, 0, tensors), jnp.zeros((2, 32, network.hidden_size))
    flops = [
        jax.jit(function).lower(state, x).compile().cost_analysis()["flops"]
        for function in (network.block, network.inputs)
    ]
    product = 2 * 2 * 32 * np.prod(network.tensors(0)["model.layers.0.mlp.down_proj.weight"])
    assert flops[0] - flops[1] > 0.95 * product


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "window"),
    [(1, None), (CHUNK, 1.0), (CHUNK + 1, None), (3 * CHUNK - 1, 200.0), (CHUNK * CHUNKS + 1, None)],
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
    rng, tensors = np.random.default_rng(0), {}
    for part in network.parts:
        for name, shape in network.tensors(part).items():
            tensors[name] = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
    structures = {jax.tree.structure(state_of(network, part, tensors)) for part in range(4)}
    assert len(structures) == 1  # so that one compilation serves all blocks
    ids = np.arange(11, dtype=np.int32)[None]
    windowed = logits_of(network, tensors, ids)
    full = logits_of(make_network(QWEN | {"use_sliding_window": False}), tensors, ids)
    np.testing.assert_allclose(windowed[:, :3], full[:, :3], rtol=1e-4, atol=1e-4)
    assert np.abs(windowed[:, 5:] - full[:, 5:]).max() > 1e-2


def test_state_is_a_float32_copy():
    network = make_network(config_of("llama_tiny"))
    tensors = {name: array for name, array in weights_of("llama_tiny").items() if name in network.tensors(1)}
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float64):
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
    assert jax.eval_shape(network.block, network.to_state(0, tensors), x).shape == x.shape


def test_a_state_takes_exactly_its_tensors():
    network = make_network(config_of("llama_tiny"))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in network.tensors(0).items()}
    name = "model.layers.0.mlp.down_proj.weight"
    array = tensors.pop(name)
    for wrong, message in (
        ({name: array.T}, rf"{name} is \[256, 96\], must be \[96, 256\]"),
        ({}, f"missing: {name}"),
        ({name: array, "model.layers.1.mlp.down_proj.weight": array}, "model.layers.1.mlp.down_proj.weight"),
    ):
        with pytest.raises(InputError, match=message):
            network.to_state(0, tensors | wrong)


@pytest.mark.parametrize(
    ("name", "old", "new"), [("opt_tiny_postnorm", "model.decoder.", "decoder."), ("llama_tiny_tied", "model.", "")]
)
def test_names_with_another_prefix(name, old, new):
    tensors = weights_of(name)
    renamed = {key.replace(old, new): array for key, array in tensors.items()}
    usual, network = make_network(config_of(name)), make_network(config_of(name), renamed)
    network.check({key: array.shape for key, array in renamed.items()})
    for part in network.parts:
        found, expected = state_of(network, part, renamed), state_of(usual, part, tensors)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["llama_tiny", "opt_tiny"])
def test_a_sequence_longer_than_the_positions(name):
    network = make_network(config_of(name))
    state = state_of(network, "embed", weights_of(name))
    ids = jnp.zeros((1, network.max_length), jnp.int32)
    assert np.isfinite(network.embed(state, ids)).all()
    with pytest.raises(InputError, match=f"takes {network.max_length} at most"):
        network.embed(state, jnp.zeros((1, network.max_length + 1), jnp.int32))
