"""Models in memory: what is a layer, and what its axes count, by the framework that made them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from farms_jax.diagnosis.pipeline import layers_of, opened
from farms_jax.diagnosis.settings import Settings
from farms_jax.errors import InputError


def shapes_of(model):
    """Layer -> (positions, outputs, inputs)."""
    source = opened(model)
    places, _ = layers_of(source, Settings())
    for place in places.values():
        assert place.read(source).shape == place.leaf.weight.shape[len(place.at) :]
    return {name: place.leaf.shape[1:] for name, place in places.items()}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dense = nnx.Linear(12, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.embed = nnx.Embed(20, 6, rngs=rngs)


def test_nnx_modules_and_their_optimiser():
    shapes = {"conv/kernel": (9, 8, 3), "dense/kernel": (1, 16, 12), "embed/embedding": (1, 6, 20)}
    model = Net(nnx.Rngs(0))
    assert shapes_of(model) == shapes_of(nnx.state(model)) == shapes
    both = nnx.ModelAndOptimizer(model, optax.adam(1e-3))
    assert shapes_of(both) == {f"model/{name}": shape for name, shape in shapes.items()}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, ("embed", "mlp")))(x)


def test_linen_variables_states_and_bound_modules():
    model = Linen()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    shapes = {"params/Conv_0/kernel": (9, 8, 3), "params/Dense_0/kernel": (1, 6, 8)}
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1, momentum=0.9))
    assert shapes_of(variables) == shapes_of(model.bind(variables)) == shapes_of(state) == shapes
    with pytest.raises(InputError, match=r"Linen: a Linen module has no weights in it; give its variables"):
        opened(model)


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    embed: eqx.nn.Embedding
    layers: eqx.nn.Linear
    kernels: eqx.nn.Conv1d
    act: object = jax.nn.relu


def test_equinox_modules_stacked_ones_too():
    keys = jax.random.split(jax.random.key(0), 2)
    model = Equinox(
        eqx.nn.Conv2d(3, 8, 3, key=keys[0]),
        eqx.nn.LayerNorm((8, 8)),
        eqx.nn.Embedding(20, 6, key=keys[0]),
        eqx.filter_vmap(lambda key: eqx.nn.Linear(12, 16, key=key))(keys),
        eqx.filter_vmap(lambda key: eqx.nn.Conv1d(6, 8, 5, key=key))(keys),
    )
    stacked = {"layers/weight": (1, 16, 12), "kernels/weight": (5, 8, 6)}
    shapes = {"conv/weight": (9, 8, 3), "embed/weight": (1, 20, 6)}
    shapes |= {f"{name}[{index}]": shape for name, shape in stacked.items() for index in range(2)}
    assert shapes_of(model) == shapes_of(eqx.filter(model, eqx.is_array)) == shapes
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    half = eqx.combine(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arrays), static)
    assert opened(half).read("conv/weight").dtype == jnp.bfloat16


def test_what_holds_no_arrays():
    for nothing in (None, object(), {}, np.float64):
        with pytest.raises(InputError, match="there are no arrays in it"):
            opened(nothing)


def test_weight_norm_of_jax_is_multiplied_out():
    inputs = jnp.eye(6)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(4, use_bias=False))(x)

    def moved(tree):
        return jax.tree.map(lambda leaf: leaf * jnp.arange(1.0, 1 + leaf.size).reshape(leaf.shape), tree)

    variables = moved(Linen().init(jax.random.key(0), inputs))
    module = nnx.WeightNorm(nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    nnx.update(module, moved(nnx.state(module, nnx.Param)))
    arrays, rest = eqx.partition(
        eqx.nn.WeightNorm(eqx.nn.Linear(6, 4, use_bias=False, key=jax.random.key(0))), eqx.is_array
    )
    equinox = eqx.combine(moved(arrays), rest)
    expected = {
        "params/Dense_0/kernel": (variables, Linen().apply(variables, inputs)),
        "layer_instance/kernel": (module, module(inputs)),
        "layer/weight": (equinox, jax.vmap(equinox)(inputs).T),
    }
    for name, (model, weight) in expected.items():
        source = opened(model)
        np.testing.assert_allclose(source.read(name), weight, rtol=1e-5, err_msg=name)
        assert list(source.skipped.values()) == [f"factor of the weight {name}"]
