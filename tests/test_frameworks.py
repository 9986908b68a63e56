"""Which matrices the parameters of each framework hold, with its ready rules and without any."""

import warnings
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import farms_jax
from farms_jax import FLAX_AXES, AxisRules, Tail, Window, axis_rules
from farms_jax._axes import as_matrices, layer_of
from farms_jax._layers import select_layers
from farms_jax.errors import InputError, LeftOutWarning

RNG = np.random.default_rng(0)
LAYERS, EXPERTS, WIDTH, HEADS, SIZE, HIDDEN = 3, 2, 20, 4, 8, 24


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def matrices_of(params, axes: Any = FLAX_AXES, stack: Any = None):
    """The matrices (K, R, C) of every layer, by name."""
    leaves = farms_jax.named_leaves(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        selection = select_layers(leaves, Window(), Tail(), axes, stack=stack, params=params)
    found = {}
    for leaf in selection.leaves:
        for name, index in leaf.indexed_layers():
            own = leaf.axes.of_layer(leaf.weight.ndim)
            found[name] = np.asarray(as_matrices(layer_of(leaf.weight, leaf.axes, index), own))[0]
    return found


def assert_matrices(found, wanted):
    """Wanted are kernels (inputs, outputs), or (K, inputs, outputs)."""
    assert sorted(found) == sorted(wanted)
    for name, kernel in wanted.items():
        kernels = kernel[None] if kernel.ndim == 2 else kernel
        np.testing.assert_array_equal(found[name], kernels.transpose(0, 2, 1), err_msg=name)


def heads(kernel, inputs=1):
    """A kernel (inputs, outputs) of one whose first axes are inputs."""
    return np.reshape(kernel, (np.prod(kernel.shape[:inputs]), -1))


def parameters(module, *shapes):
    variables = jax.eval_shape(module.init, jax.random.key(0), *map(jnp.ones, shapes))
    return jax.tree.map(lambda leaf: noise(*leaf.shape), variables["params"])


# Without a declaration.


class DenseGenerals(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((HEADS, SIZE))(x)
        x = nn.DenseGeneral((6, SIZE), axis=(-2, -1))(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1))(x)
        x = nn.DenseGeneral((3, HEADS, SIZE), name="qkv")(x)
        return nn.DenseGeneral(WIDTH, batch_dims=(0,))(x)


def test_dense_layers_with_several_axes_are_recognised_by_their_bias():
    params = parameters(DenseGenerals(), (2, WIDTH))
    inputs = {"DenseGeneral_0": 1, "DenseGeneral_1": 2, "DenseGeneral_2": 2, "qkv": 1}
    assert_matrices(
        matrices_of(params), {f"{name}/kernel": heads(params[name]["kernel"], n) for name, n in inputs.items()}
    )
    report = str(farms_jax.analyze({"DenseGeneral_0": params["DenseGeneral_0"]}))
    assert "rows or columns are several axes, as heads are: DenseGeneral_0/kernel\n" in report


def test_a_stack_along_the_last_axis_is_no_dense_layer_with_several_outputs():
    params = {
        "query": {"kernel": noise(WIDTH, HEADS, SIZE, LAYERS), "bias": noise(HEADS, SIZE, LAYERS)},
        "norm": {"scale": noise(WIDTH, LAYERS)},
    }
    assert matrices_of(params) == {}
    kernel = params["query"]["kernel"]
    wanted = {f"query/kernel[{i}]": heads(kernel[..., i]) for i in range(LAYERS)}
    assert_matrices(matrices_of(params, {"query/kernel": "IOO"}, stack=-1), wanted)


def test_attention_to_something_else_is_recognised():
    module = nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * SIZE)
    params = parameters(module, (1, 2, WIDTH), (1, 2, HIDDEN))
    wanted = {f"{name}/kernel": heads(params[name]["kernel"], 2 if name == "out" else 1) for name in params}
    assert params["key"]["kernel"].shape == (HIDDEN, HEADS, SIZE)
    assert_matrices(matrices_of(params), wanted)


def test_experts_are_no_convolution_and_local_convolutions_have_no_shared_kernel():
    params = {
        "conv": {"kernel": noise(3, 3, 16, 20)},
        "spectrogram_conv": {"kernel": noise(3, 10, 16, 20)},
        "patches": {"kernel": noise(16, 16, 3, 20)},
        "moe": {"up": noise(LAYERS, LAYERS, 16, 20)},
        "mlp": {"up": noise(LAYERS, 4, 16, 20)},
        "blocks": {"up": {"kernel": noise(12, 12, 64, 64)}},
        "local": {"kernel": noise(6, 6, 36, 20), "bias": noise(6, 6, 20)},
    }
    kernels = {name: params[name]["kernel"] for name in ("conv", "spectrogram_conv", "patches")}
    wanted = {f"{name}/kernel": kernel.reshape(-1, *kernel.shape[2:]) for name, kernel in kernels.items()}
    assert_matrices(matrices_of(params), wanted)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm/weight", (6, WIDTH)),
        ("blocks/RMSNorm_0/kernel", (6, WIDTH)),
        ("ln_1/w", (6, WIDTH)),
        ("attn_norm", (6, WIDTH)),
        ("blocks/biases", (6, WIDTH)),
        ("mlp/b1", (6, WIDTH)),
        ("attention/q_gamma", (6, WIDTH)),
        ("mixer/A_log", (6, WIDTH)),
        ("relpos_bias/rel_embedding", (HEADS, 32)),
        ("relative_attention_bias/embedding", (32, HEADS)),
        ("position/embedding", (64, WIDTH)),
        ("abs_pos", (64, WIDTH)),
    ],
)
def test_what_is_no_matrix_by_its_name(name, shape):
    assert matrices_of({name: noise(*shape)}) == {}


@pytest.mark.parametrize("name", ["pos_embed_proj/kernel", "lora/B", "norm_up/kernel", "conv_norm/kernel", "k_pe"])
def test_what_is_a_matrix_in_spite_of_its_name(name):
    shape = (3, 3, 16, 20) if "conv" in name else (24, 20)
    assert list(matrices_of({name: noise(*shape)})) == [name]


def test_a_dense_layer_called_after_positions_has_a_bias():
    params = {"pos": {"w": noise(16, 20), "b": noise(20)}, "position": {"w": noise(16, 20)}}
    assert_matrices(matrices_of(params), {"pos/w": params["pos"]["w"]})


def test_a_weight_of_the_shape_of_its_bias_multiplies_element_by_element():
    params = {"first": {"weight": noise(16, 20), "bias": noise(16, 20)}, "dense_norm": {"kernel": noise(16, 20)}}
    params["dense_norm"]["bias"] = noise(20)
    assert_matrices(matrices_of(params), {"dense_norm/kernel": params["dense_norm"]["kernel"]})


def test_a_flattened_dictionary_reads_like_its_tree():
    params = {"dense": {"kernel": noise(16, 20), "bias": noise(6, 20)}}
    found = matrices_of(flatten_dict(params))
    assert_matrices(found, {"dense/kernel": params["dense"]["kernel"]})


@jax.tree_util.register_pytree_node_class
class Named:
    """An array with names of its axes, as Haliax has them: JAX knows no name of the array itself."""

    def __init__(self, array, *names):
        self.array, self.axes = array, [SimpleNamespace(name=name) for name in names]

    def tree_flatten(self):
        return (self.array,), tuple(axis.name for axis in self.axes)

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(*children, *names)


def test_named_arrays_are_read_by_the_names_of_their_axes():
    kernel = noise(LAYERS, WIDTH, HEADS, SIZE)
    params = {
        "q": {
            "weight": Named(kernel, "layers", "embed", "heads", "head_size"),
            "bias": Named(noise(LAYERS, HEADS, SIZE), "layers", "heads", "head_size"),
        }
    }
    wanted = {f"q/weight[{i}]": heads(kernel[i]) for i in range(LAYERS)}
    assert_matrices(matrices_of(params, axis_rules.logical_names), wanted)
    tx = farms_jax.tempbalance(refresh_every=1, axes=axis_rules.logical_names)
    updates, state = tx.update(params, tx.init(params), params)
    factors = state.hyperparams["lr_scale"]["q"]
    np.testing.assert_array_equal(factors["bias"].ravel(), factors["weight"].ravel())
    np.testing.assert_allclose(updates["q"]["weight"].array, kernel * factors["weight"])


# Ready declarations.


@pytest.mark.parametrize("scan_axis", [0, 1])
def test_maxtext(scan_axis):
    axes = (0, 1) if scan_axis == 0 else (1, 0)  # of layers and experts
    experts, biases = noise(LAYERS, EXPERTS, WIDTH, HIDDEN), noise(LAYERS, EXPERTS, HIDDEN)
    fused, alone = noise(LAYERS, WIDTH, HEADS, SIZE), noise(EXPERTS, HIDDEN, WIDTH)
    scanned = {
        "moe_block": {"wi_0": np.moveaxis(experts, (0, 1), axes), "wi_0_bias": np.moveaxis(biases, (0, 1), axes)},
        "self_attention": {"qkv_proj": {"kernel": np.moveaxis(fused, 0, scan_axis)}},
    }
    params = {"decoder": {"scanned_blocks": scanned, "layers_0": {"mlp": {"routed_experts": {"wo": alone}}}}}
    rules = axis_rules.maxtext(scan_axis)
    indices = np.ndindex(LAYERS, EXPERTS)
    wanted = {f"decoder/scanned_blocks/moe_block/wi_0[{i},{j}]": experts[i, j] for i, j in indices}
    wanted |= {f"decoder/scanned_blocks/self_attention/qkv_proj/kernel[{i}]": heads(fused[i]) for i in range(LAYERS)}
    wanted |= {f"decoder/layers_0/mlp/routed_experts/wo[{j}]": alone[j] for j in range(EXPERTS)}
    assert_matrices(matrices_of(params, rules), wanted)
    block = farms_jax.lr_scale(farms_jax.analyze(params, axes=rules), params)["decoder"]["scanned_blocks"]["moe_block"]
    np.testing.assert_array_equal(block["wi_0_bias"], block["wi_0"].squeeze(-1))


@pytest.mark.parametrize("library", ["tunix", "big_vision"])
@pytest.mark.parametrize("is_scanned", [False, True])
def test_gemma(library, is_scanned):
    # As the models of Gemma and Tunix count layers, and as big_vision stacks them.
    q, kv = noise(LAYERS, HEADS, WIDTH, SIZE), noise(LAYERS, 2, HEADS, WIDTH, SIZE)
    out, gating = noise(LAYERS, HEADS, SIZE, WIDTH), noise(LAYERS, 2, WIDTH, HIDDEN)
    stacked = {
        "attn": {"q_einsum": {"w": q}, "kv_einsum": {"w": kv}, "attn_vec_einsum": {"w": out}},
        "mlp": {"gating_einsum": gating},
        "pre_attention_norm": {"scale": noise(LAYERS, WIDTH)},
    }
    apart = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(LAYERS)}
    found = matrices_of({"layers": stacked if is_scanned else apart}, getattr(axis_rules, library)())
    wanted = {}
    for i in range(LAYERS):

        def name(leaf, i=i, *which):
            index = f"[{','.join(map(str, (i, *which) if is_scanned else which))}]"
            return f"layers/{leaf}{index}" if is_scanned else f"layers/{i}/{leaf}{index if which else ''}"

        wanted[name("attn/q_einsum/w")] = heads(q[i].transpose(1, 0, 2))
        wanted[name("attn/attn_vec_einsum/w")] = heads(out[i], 2)
        for j in range(2):
            wanted[name("attn/kv_einsum/w", i, j)] = heads(kv[i, j].transpose(1, 0, 2))
            wanted[name("mlp/gating_einsum", i, j)] = gating[i, j]
    assert_matrices(found, wanted)


def test_tunix_has_experts_and_biases_beside_their_modules():
    experts, kernel = noise(EXPERTS, WIDTH, HIDDEN), noise(WIDTH, HEADS, SIZE)
    params = {
        "layers": {
            "0": {
                "attn": {"q_proj": {"w": kernel}, "q_bias": noise(4, 8)},
                "mlp": {"up_proj": experts},
            }
        }
    }
    wanted = {"layers/0/attn/q_proj/w": heads(kernel)}
    wanted |= {f"layers/0/mlp/up_proj[{j}]": experts[j] for j in range(EXPERTS)}
    assert_matrices(matrices_of(params, axis_rules.tunix()), wanted)
    factors = factors_of(params, axes=axis_rules.tunix())
    assert factors["layers/0/attn/q_bias"] == factors["layers/0/attn/q_proj/w"] != 1


def test_adapters_are_recognised_by_their_rank():
    a, b, kv = noise(HEADS, SIZE, 6), noise(6, WIDTH), noise(6, 2, HEADS, SIZE)
    params = {
        "layer_0": {
            "attn_vec_einsum": {"lora": {"a": a, "b": b}},
            "kv_einsum": {"lora": {"a": noise(WIDTH, 6), "b": kv}},
            "bias": {"b": noise(6, WIDTH)},
        }
    }
    at = "layer_0/kv_einsum/lora"
    wanted = {"layer_0/attn_vec_einsum/lora/a": heads(a, 2), "layer_0/attn_vec_einsum/lora/b": b}
    wanted |= {f"{at}/a": params["layer_0"]["kv_einsum"]["lora"]["a"]}
    assert_matrices(matrices_of(params), wanted | {f"{at}/b": heads(kv)})
    wanted |= {f"{at}/b[{i}]": heads(kv[:, i]) for i in range(2)}
    assert_matrices(matrices_of(params, axis_rules.tunix()), wanted)


def test_big_vision_scans_decoders_along_their_second_axis():
    query, up = noise(WIDTH, LAYERS, HEADS, SIZE), noise(WIDTH, LAYERS, HIDDEN)
    params = {"EncDecBlock": {"SelfAttn": {"query": {"kernel": query}}, "Dense_0": {"kernel": up}}}
    wanted = {f"EncDecBlock/Dense_0/kernel[{i}]": up[:, i] for i in range(LAYERS)}
    wanted |= {f"EncDecBlock/SelfAttn/query/kernel[{i}]": heads(query[:, i]) for i in range(LAYERS)}
    assert_matrices(matrices_of(params, axis_rules.big_vision()), wanted)


@pytest.mark.parametrize("axes", [FLAX_AXES, axis_rules.haiku()], ids=["none", "haiku"])
def test_layer_stacks_of_haiku_in_each_other(axes):
    kernel, name = noise(EXPERTS, LAYERS, WIDTH, HIDDEN), "__layer_stack_no_per_layer/__layer_stack_no_per_layer/linear"
    found = matrices_of({name: {"w": kernel, "b": noise(EXPERTS, LAYERS, HIDDEN)}}, axes)
    assert_matrices(found, {f"{name}/w[{i},{j}]": kernel[i, j] for i, j in np.ndindex(EXPERTS, LAYERS)})


def test_modules_derived_from_those_of_equinox():
    eqx = pytest.importorskip("equinox")

    class Norm(eqx.nn.LayerNorm):
        pass

    class Filter(eqx.nn.Conv1d):
        pass

    model = {"filter": Filter(16, 20, 3, key=jax.random.key(0)), "last": Norm((20, 16), use_bias=False)}
    params = eqx.filter(model, eqx.is_inexact_array)
    kernel = np.asarray(params["filter"].weight).transpose(2, 1, 0)
    assert_matrices(matrices_of(params, axis_rules.equinox), {"filter/weight": kernel})
    # A tree of a callable module is a tree.
    declared = jax.tree.map(lambda leaf: "OIK" if leaf.ndim == 3 else None, params)
    assert_matrices(matrices_of(params["filter"], declared["filter"]), {"weight": kernel})


def test_logical_names_of_biases_and_pipelines():
    kernel = noise(2, WIDTH, LAYERS, HIDDEN)
    params = {
        "up": {
            "kernel": nn.LogicallyPartitioned(kernel, ("circular_repeats", "embed", "moe_layers", "mlp")),
            "bias": nn.LogicallyPartitioned(
                noise(2, LAYERS, HEADS, SIZE), ("circular_repeats", "moe_layers", "kv", None)
            ),
        }
    }
    wanted = {f"up/kernel[{i},{j}]": kernel[i, :, j] for i, j in np.ndindex(2, LAYERS)}
    assert_matrices(matrices_of(params, axis_rules.logical_names), wanted)


# Followers, declarations and warnings.


def factors_of(params, **settings):
    report = farms_jax.analyze(params, **settings)
    return dict(farms_jax.named_leaves(farms_jax.lr_scale(report, params)))


def test_a_bias_follows_the_weight_that_it_is_called_after():
    experts = {"up": noise(LAYERS, WIDTH, HIDDEN), "up_bias": noise(LAYERS, HIDDEN)}
    experts |= {"down": noise(LAYERS, HIDDEN, WIDTH), "down_bias": noise(LAYERS, WIDTH)}
    cell = {"weight_ih": noise(WIDTH, HIDDEN), "bias_ih": noise(HIDDEN), "weight_hh": noise(HIDDEN, HIDDEN)}
    found = factors_of({"experts": experts, "cell": cell}, stack={r"experts/(up|down)": 0})
    for name in ("up", "down"):  # whose stack is not declared of the biases
        assert found[f"experts/{name}_bias"].shape == (LAYERS, 1)
        np.testing.assert_array_equal(found[f"experts/{name}_bias"].ravel(), found[f"experts/{name}"].ravel())
    assert found["cell/bias_ih"] == found["cell/weight_ih"] != found["cell/weight_hh"]


@pytest.mark.parametrize("axis", [1, -1])
def test_a_bias_has_the_stack_of_its_weight(axis):
    params = {"up": {"kernel": np.moveaxis(noise(LAYERS, WIDTH, HIDDEN), 0, axis), "bias": noise(HIDDEN, LAYERS)}}
    found = factors_of(params, stack={"up/kernel": axis})
    assert found["up/bias"].shape == (1, LAYERS)
    np.testing.assert_array_equal(found["up/bias"].ravel(), found["up/kernel"].ravel())


def test_numbers_of_muon_made_by_rank_leave_biases_alone():
    muon = optax.contrib.MuonDimensionNumbers
    params = {"query": {"kernel": noise(WIDTH, HEADS, SIZE), "bias": noise(HEADS, SIZE)}}

    def numbers(tree):
        return jax.tree.map(lambda leaf: muon(0, tuple(range(1, leaf.ndim))) if leaf.ndim > 1 else None, tree)

    assert_matrices(matrices_of(params, numbers), {"query/kernel": heads(params["query"]["kernel"])})


def test_a_tree_of_stacks_may_have_none():
    params = {"blocks": {"w": noise(LAYERS, WIDTH, HIDDEN)}, "head": {"w": noise(WIDTH, HIDDEN)}}
    found = matrices_of(params, stack={"blocks": {"w": 0}, "head": {"w": None}})
    assert list(found) == ["blocks/w[0]", "blocks/w[1]", "blocks/w[2]", "head/w"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"w": optax.contrib.MuonDimensionNumbers(0, (0, 1))}}, "axes: w is given axis 0 for its inputs and"),
        ({"axes": AxisRules({"w": 3})}, "axes: 3, given for w, is none of"),
        ({"stack": {"w": "0"}}, "stack: '0', given for w, is none of"),
        ({"axes": {"w": "OIK"}}, "axes: 'OIK', given for w, spells 3 axes; it has 4: (3, 20, 24, 5); say with `stack`"),
    ],
)
def test_a_wrong_declaration_is_one_clear_error(settings, message):
    with pytest.raises(InputError) as error:
        farms_jax.analyze({"w": noise(LAYERS, WIDTH, HIDDEN, 5)}, **settings)
    assert message in str(error.value)


def test_tempbalance_warns_once():
    params = {"stacked": {"kernel": noise(LAYERS, WIDTH, WIDTH)}, "dense": {"kernel": noise(WIDTH, WIDTH)}}
    tx = farms_jax.tempbalance(refresh_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(params)
        for update in (jax.jit(tx.update), tx.update, tx.update):
            _, state = update(params, state, params)
    assert [str(each.message)[:31] for each in caught] == ["75% of the weights are left out"]
