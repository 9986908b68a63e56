"""Stacks of layers that a tree tells of by itself, of Linen, NNX and plain functions; and trees that tell of none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights_helpers import write

import farms_jax
from farms_jax import AxisRules
from farms_jax.diagnosis.pipeline import layers_of, opened
from farms_jax.diagnosis.settings import Settings
from farms_jax.errors import AxesWarning, LeftOutWarning
from farms_jax.weights import TensorInfo
from farms_jax.weights.stacks import find

RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN, HEADS = 3, 16, 32, 2


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        scan = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        x, _ = scan(name="blocks")(nn.Embed(40, WIDTH)(tokens), None)
        return nn.Dense(40)(nn.LayerNorm()(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm, self.up = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class NNXScanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NNXBlock))(rngs)
        self.head = nnx.Linear(WIDTH, 40, rngs=rngs)


def noise(shapes):
    return jax.tree.map(lambda leaf: RNG.standard_normal(leaf.shape).astype(np.float32), shapes)


def scanned(axis):
    tokens = jnp.zeros((1, 8), jnp.int32)
    return noise(jax.eval_shape(Scanned(axis).init, jax.random.key(0), tokens)["params"])


def places(model, **declared):
    """The axes and the index of every layer, by name."""
    with opened(model, **declared) as source:
        return {name: (place.leaf.axes, place.at) for name, place in layers_of(source, Settings())[0].items()}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_model_has_the_layers_that_a_declared_one_has(tmp_path, axis):
    params = scanned(axis)
    wanted = places(params, stack={"blocks/.*": axis})
    assert len(wanted) == 2 + 6 * LAYERS
    said = (
        rf"^blocks is read as 3 layers stacked along axis {axis} of all its 16 arrays: Dense_0/kernel \(.*\) has the "
        r"bias \(.*\), the norm LayerNorm_0/scale \(.*\); where that is wrong, say it with `axes` or `stack`"
    )
    flat = dict(farms_jax.named_leaves(params))
    for model in (params, write("msgpack", tmp_path, flat), write("orbax", tmp_path, flat)):
        with pytest.warns(AxesWarning, match=said) as warned:
            assert places(model) == wanted
        assert len(warned) == 1


def test_layers_of_a_stack_have_the_alphas_of_a_declared_one():
    quick = {"resamples": 0, "randomize": False, "whole": False, "include": r"blocks/Dense_0/.*"}
    params = scanned(0)
    with pytest.warns(AxesWarning, match="blocks is read as 3 layers"):
        found = farms_jax.diagnose(params, **quick)
    wanted = farms_jax.diagnose(params, stack={"blocks/.*": 0}, **quick)
    assert (found.names, found.column("alpha")) == (wanted.names, wanted.column("alpha"))
    assert found.settings["axes"]["stack"] == {"blocks/.*": (0,)}


def test_modules_of_nnx_are_recognised_in_memory():
    model = nnx.eval_shape(lambda: NNXScanned(nnx.Rngs(0)))
    with pytest.warns(AxesWarning, match="blocks is read as 3 layers stacked along axis 0 of all its 12 arrays"):
        found = places(model)
    assert found == places(model, stack={"blocks/.*": 0})
    assert len(found) == 1 + 5 * LAYERS


def test_a_stack_in_a_stack_counts_by_both():
    params = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), scanned(1))
    with pytest.warns(AxesWarning, match="the whole tree is read as 2 .* axis 0 .*; blocks is read as 3 .*axis 2"):
        found = places(params)
    assert found == places(params, stack={"blocks/.*": (0, 2), "(?!blocks).*": 0})


@pytest.mark.parametrize(
    "declared",
    [{"axes": farms_jax.FLAX_AXES}, {"axes": AxisRules({}, default=None)}, {"stack": {"blocks/LayerNorm.*": 0}}],
)
def test_beside_what_is_declared_nothing_is_guessed(declared):
    with pytest.warns(LeftOutWarning, match="of the weights are left out"):
        assert set(places(scanned(0), **declared)) == {"Dense_0/kernel", "Embed_0/embedding"}


PLAIN = {"wq": (16, 16), "up": (16, 24), "down": (24, 16), "attention_norm": (16,), "ffn_norm/scale": (16,)}
NONE = {
    "a block alone": {"up/kernel": (8, 32), "up/bias": (32,), "norm/scale": (8,)},
    "a single module": {"up/kernel": (6, 8, 32), "up/bias": (6, 32)},
    "heads": {"query/kernel": (8, 2, 4), "query/bias": (2, 4), "out/kernel": (2, 4, 8), "out/bias": (8,)},
    "heads as wide as all": {
        **{f"{name}/kernel": (4, 4, 4) for name in ("query", "key", "DenseGeneral_0")},
        **{f"{name}/bias": (4, 4) for name in ("query", "key", "DenseGeneral_0")},
        "norm/scale": (4, 4),
    },
    "norms over two axes": {
        **{"norm/scale": (6, 8), "norm/bias": (6, 8)},
        **{"up/kernel": (8, 32), "up/bias": (32,), "down/kernel": (6, 8, 6, 32), "down/bias": (6, 32)},
    },
    "norms of two axes before merged ones": {"norm/scale": (6, 8), "DenseGeneral_0/kernel": (6, 8, 32)},
    "heads apart": {"q/w": (4, 16, 8), "k/w": (4, 16, 8), "out/w": (4, 8, 16), "norm/scale": (4, 8)},
    "convolutions in time": {"a/kernel": (3, 8, 16), "b/kernel": (3, 16, 8), "norm/scale": (16,), "a/bias": (16,)},
    "kernels that share nothing": {
        **{"ConvLocal_0/kernel": (6, 24, 8), "ConvLocal_0/bias": (6, 8)},
        **{"ConvLocal_1/kernel": (6, 24, 4), "ConvLocal_1/bias": (6, 4)},
    },
    "another length": {f"blocks/{name}": (6, *shape) for name, shape in PLAIN.items()} | {"blocks/pos": (7, 16)},
    "a matrix of that length": {f"a/{name}": (6, *shape) for name, shape in PLAIN.items()} | {"a/in/kernel": (6, 16)},
}


def infos(shapes):
    return {name: TensorInfo(np.dtype(np.float32), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("shapes", NONE.values(), ids=NONE)
def test_where_it_is_not_sure_nothing_is_guessed(shapes):
    assert find(infos(shapes)) == []


def test_blocks_without_biases_are_recognised_apart_from_what_is_beside_them():
    shapes = {f"net/blocks/{name}": (6, *shape) for name, shape in PLAIN.items()} | {"net/head/kernel": (6, 16)}
    (stack,) = find(infos(shapes))
    assert (stack.prefix, stack.axes, stack.length) == ("net/blocks/", (0,), 6)
    assert stack.evidence == "up (6, 16, 24) and down (6, 24, 16), the norm attention_norm (6, 16)"
