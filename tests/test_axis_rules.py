"""What the axes of leaves count, declared or recognised; stacks equal their layers one by one."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import farms_jax
from benchmarks import _layouts, stacked
from farms_jax import TORCH_AXES, AxisRules, axis_rules
from farms_jax._axes import LeafAxes, as_matrices
from farms_jax._axis_rules import axes_spelt
from farms_jax.errors import InputError

RNG = np.random.default_rng(0)
LAYERS, WIDTH, HEADS, SIZE = 3, 32, 4, 8


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def alphas(params, **settings):
    report = farms_jax.analyze(params, **settings)
    return dict(zip(report.names, np.asarray(report.alpha).tolist(), strict=True))


def assert_same(found, wanted):
    """Alphas by name, to the 1e-6 that rounding of the same products may differ by."""
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-6)


# Each spelling of a leaf, with the matrices (K, R, C) that it means.
SPELLINGS = {
    "IO": (noise(24, 20), lambda w: w.T[None]),
    "OI": (noise(20, 24), lambda w: w[None]),
    "IOO": (noise(WIDTH, HEADS, SIZE), lambda w: w.reshape(WIDTH, HEADS * SIZE).T[None]),
    "IIO": (noise(HEADS, SIZE, WIDTH), lambda w: w.reshape(HEADS * SIZE, WIDTH).T[None]),
    "OIO": (noise(HEADS, WIDTH, SIZE), lambda w: w.transpose(0, 2, 1).reshape(HEADS * SIZE, WIDTH)[None]),
    "KIO": (noise(5, 16, 20), lambda w: w.transpose(0, 2, 1)),
    "OIK": (noise(20, 16, 5), lambda w: w.transpose(2, 0, 1)),
    "DHWIO": (noise(2, 3, 3, 16, 20), lambda w: w.reshape(18, 16, 20).transpose(0, 2, 1)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_gives_the_matrices_that_it_means(spelling):
    weight, meant = SPELLINGS[spelling]
    axes = axes_spelt("w", spelling, weight.shape, ())
    np.testing.assert_array_equal(as_matrices(weight, axes)[0], meant(weight))


def test_stack_axes_come_first_in_their_own_order():
    weight = noise(2, 3, 20, 24)  # experts, layers
    matrices = as_matrices(weight, LeafAxes(outputs=(3,), inputs=(2,), stack=(1, 0)))
    np.testing.assert_array_equal(matrices[2 * 1 + 1, 0], weight[1, 1].T)


def attention_params(layers=None):
    """Parameters of a block as Flax's modules name and shape them."""
    before = () if layers is None else (layers,)
    kernel, bias = noise(*before, WIDTH, HEADS, SIZE), noise(*before, HEADS, SIZE)
    return {
        "attention": {
            "query": {"kernel": kernel, "bias": bias},
            "out": {"kernel": noise(*before, HEADS, SIZE, WIDTH), "bias": noise(*before, WIDTH)},
        },
        "norm": {"scale": noise(*before, WIDTH), "bias": noise(*before, WIDTH)},
        "up": {"kernel": noise(*before, WIDTH, 48), "bias": noise(*before, 48)},
    }


def as_2d(params):
    """The same block in plain matrices (inputs, outputs)."""
    attention = params["attention"]
    return {
        "attention/out/kernel": attention["out"]["kernel"].reshape(HEADS * SIZE, WIDTH),
        "attention/query/kernel": attention["query"]["kernel"].reshape(WIDTH, HEADS * SIZE),
        "up/kernel": params["up"]["kernel"],
    }


def test_attention_is_recognised_and_its_biases_are_no_layers():
    params = attention_params()
    assert_same(alphas(params), alphas(as_2d(params)))
    factors = farms_jax.lr_scale(farms_jax.analyze(params), params)["attention"]
    assert factors["query"]["bias"] == factors["query"]["kernel"] != factors["out"]["kernel"] == factors["out"]["bias"]


WAYS = {
    "patterns": {r".*/query/kernel": "IOO", r".*/out/kernel": "IIO", r"norm/.*": None},
    "tree": {
        "attention": {"query": {"kernel": "IOO", "bias": None}, "out": {"kernel": "IIO", "bias": None}},
        "norm": {"scale": None, "bias": None},
        "up": {"kernel": farms_jax.FLAX_AXES, "bias": None},
    },
    "function": lambda params: {
        f"attention/{name}/kernel": "IOO" if name == "query" else "IIO" for name in params["attention"]
    },
    "dimension numbers of Muon": {
        r".*/query/kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
        r".*/out/kernel": optax.contrib.MuonDimensionNumbers((0, 1), 2),
    },
    "rules": axis_rules.flax_attention(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_declare_says_the_same(way):
    params = attention_params()
    assert_same(alphas(params, axes=WAYS[way]), alphas(as_2d(params)))


def stacked_factors(params, **settings):
    report = farms_jax.analyze(params, **settings)
    return farms_jax.lr_scale(report, params)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_a_stack_equals_its_layers_one_by_one(traced):
    params, stack = attention_params(LAYERS), {r".*": 0}
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(LAYERS)]
    wanted = alphas({str(i): layer for i, layer in enumerate(layers)})
    analyze = jax.jit(farms_jax.analyze, static_argnames="stack") if traced else farms_jax.analyze
    report = analyze(params, stack=0 if traced else stack)
    names = [f"{name}[{i}]" for name in as_2d(layers[0]) for i in range(LAYERS)]
    assert list(report.names) == names
    found = dict(zip(report.names, np.asarray(report.alpha).tolist(), strict=True))
    for i in range(LAYERS):
        for name in as_2d(layers[0]):
            assert found[f"{name}[{i}]"] == pytest.approx(wanted[f"{i}/{name}"], rel=1e-6)


def test_factors_of_a_stack_broadcast_to_their_leaves_and_are_those_of_its_layers():
    params = attention_params(LAYERS)
    factors = stacked_factors(params, stack=0)
    apart = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(LAYERS)}
    wanted = stacked_factors(apart)
    for name, leaf in farms_jax.named_leaves(params):
        factor = dict(farms_jax.named_leaves(factors))[name]
        assert factor.shape == (LAYERS, *[1] * (leaf.ndim - 1)), name
        own = [dict(farms_jax.named_leaves(wanted))[f"{i}/{name}"] for i in range(LAYERS)]
        np.testing.assert_allclose(factor.ravel(), own, rtol=1e-6, err_msg=name)


def test_layers_of_experts_have_a_factor_each():
    params = {"moe": {"wi": noise(2, LAYERS, WIDTH, 48)}, "gate": {"kernel": noise(WIDTH, LAYERS, 2 * SIZE)}}
    report = farms_jax.analyze(params, stack={"moe/wi": (1, 0), "gate/.*": 1})
    assert report.names[LAYERS:] == tuple(f"moe/wi[{i},{j}]" for i in range(LAYERS) for j in range(2))
    factors = farms_jax.lr_scale(report, params)
    assert factors["moe"]["wi"].shape == (2, LAYERS, 1, 1)
    assert factors["gate"]["kernel"].shape == (1, LAYERS, 1)
    wanted = np.asarray(report.alpha)[LAYERS:].reshape(LAYERS, 2).T
    order = np.argsort(factors["moe"]["wi"].ravel())
    np.testing.assert_array_equal(order, np.argsort(wanted.ravel()))


@pytest.mark.parametrize("every", [None, 1], ids=["refresh", "refresh_every"])
def test_both_doors_of_tempbalance_take_a_stack(every):
    params, rules = attention_params(LAYERS), AxisRules(stack={r".*": 0})
    factors = stacked_factors(params, axes=rules)
    settings = {} if every is None else {"axes": rules}
    tx = farms_jax.tempbalance(refresh_every=every, **settings)
    state = tx.init(params)
    if every is None:
        state = farms_jax.refresh(state, factors)
    updates, state = jax.jit(tx.update)(params, state, params)
    jax.tree.map(
        lambda found, leaf, factor: np.testing.assert_allclose(found, leaf * factor, rtol=1e-5),
        updates,
        params,
        factors,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"up/kernel": "IOO"}}, "spells 3 axes; it has 2: (32, 48)"),
        ({"axes": {"up/kernel": "II"}}, "an I for inputs and an O for outputs"),
        ({"axes": {"down/kernel": "IO"}}, "axes: 'down/kernel' matches no name"),
        ({"axes": {"up": {"kernel": "IO"}}}, "axes: the tree has nothing for attention/out/bias"),
        ({"axes": {"attention": {"query": {"kernel": 3}}}}, "axes: 3, given for attention/query/kernel"),
        (
            {"axes": {r"attention/query/kernel": TORCH_AXES}},
            "attention/query/kernel has shape (32, 4, 8); `Axes` are for",
        ),
        ({"axes": AxisRules(stack={".*": 0}), "stack": 0}, "give it in one place"),
        ({"stack": {"up/.*": 2}}, "stack: up/bias has no axis 2; its shape is (48,)"),
        ({"stack": {"up/kernel": (0, -2)}}, "stack: up/kernel is given one of its axes twice"),
        ({"stack": {"up/kernel": 0}, "axes": {"up/kernel": "IO"}}, "it has 1 beside its stack's 1: (32, 48)"),
    ],
)
def test_a_declaration_that_does_not_fit_names_the_leaf(settings, message):
    with pytest.raises(InputError) as error:
        farms_jax.analyze(attention_params(), **settings)
    assert message in str(error.value)


def test_what_nothing_is_declared_of_is_left_out_with_a_warning():
    params = {"stacked": {"kernel": noise(LAYERS, WIDTH, WIDTH)}, "dense": {"kernel": noise(WIDTH, WIDTH)}}
    with pytest.warns(UserWarning, match=r"75% of the weights are left out.*stacked/kernel"):
        report = farms_jax.analyze(params)
    assert report.names == ("dense/kernel",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        farms_jax.analyze(params, exclude=r"stacked/.*")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks/query/kernel", (6, 64, 4, 16)),
        ("blocks/up/kernel", (12, 40, 64, 64)),
        ("cell/kernel", (3, 64, 64)),
        ("norm/scale", (LAYERS, WIDTH)),
        ("wpe/embedding", (64, WIDTH)),
        ("pos_embedding", (1, 64, WIDTH)),
        ("head/kernel", (64, 1)),
        ("layer/b", (WIDTH, WIDTH)),
    ],
)
def test_what_is_no_layer(name, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = farms_jax.analyze({name: noise(*shape), "dense/kernel": noise(WIDTH, WIDTH)})
    assert report.names == ("dense/kernel",)
    assert [left for left, _ in report.left_out] == [name]


def test_convolutions_are_read_with_their_positions():
    params = {"conv": {"kernel": noise(3, 3, 16, 32), "bias": noise(32)}, "dense": {"kernel": noise(32, 32)}}
    assert "convolutions of 9 positions: conv/kernel" in str(farms_jax.analyze(params))


def test_a_weight_left_out_does_not_follow_its_bias_but_a_bias_of_any_rank_its_weight():
    params = attention_params()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = farms_jax.lr_scale(farms_jax.analyze(params, axes={r".*/query/kernel": None}), params)["attention"]
    assert factors["query"]["kernel"] == factors["query"]["bias"] == 1


def test_single_layers_of_a_stack_are_excluded():
    params = {"blocks": {"kernel": noise(LAYERS, WIDTH, WIDTH)}, "head": {"kernel": noise(WIDTH, WIDTH)}}
    report = farms_jax.analyze(params, stack={"blocks/.*": 0}, exclude=r".*\[0\]")
    assert report.names == ("blocks/kernel[1]", "blocks/kernel[2]", "head/kernel")
    assert farms_jax.lr_scale(report, params)["blocks"]["kernel"].ravel()[0] == 1


def test_one_outlier_does_not_own_the_range():
    params = {f"dense_{i}": {"kernel": noise(64, 64)} for i in range(10)}
    params["dense_3"]["kernel"] = np.linalg.qr(noise(64, 64))[0] + 0.05 * noise(64, 64)
    report = farms_jax.analyze(params)
    assert report.alpha.argmax() == 3 and report.alpha[3] > 2.8
    without = report.drop("dense_3/kernel")
    robust = farms_jax.lr_scale(report, params, range_quantiles=(0, 0.9))
    assert robust["dense_3"]["kernel"] == 1.5
    for name in without.names:
        wanted = dict(farms_jax.named_leaves(farms_jax.lr_scale(without, params)))[name]
        assert dict(farms_jax.named_leaves(robust))[name] == pytest.approx(float(wanted), rel=1e-5)


# Ready rules, each on parameters made by the framework itself or in its layout.


def small_llama():
    """Two blocks with grouped keys and values, under Hugging Face's names."""
    inputs = {"q_proj": WIDTH, "k_proj": WIDTH, "v_proj": WIDTH, "o_proj": WIDTH, "gate_proj": WIDTH, "up_proj": WIDTH}
    outputs = {"k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "gate_proj": 48, "up_proj": 48, "down_proj": WIDTH}
    weights = _layouts.Weights({}, 2, SIZE)
    for block in range(2):
        for part in (*inputs, "down_proj"):
            shape = outputs.get(part, WIDTH), inputs.get(part, 48)
            weights.tensors[weights.name(block, part)] = noise(*shape)
    return weights


@pytest.mark.parametrize("every", [None, 1], ids=["refresh", "refresh_every"])
@pytest.mark.parametrize("layout", stacked.LAYOUTS)
def test_every_layout_of_a_llama_has_the_numbers_of_hugging_face(layout, every):
    lay_out, axes = stacked.LAYOUTS[layout]
    weights = small_llama()
    params, names = lay_out(weights)
    plain = farms_jax.analyze(weights.tensors, axes=TORCH_AXES)
    report = farms_jax.analyze(params, axes=axes)
    found = {names[name]: alpha for name, alpha in zip(report.names, np.asarray(report.alpha).tolist(), strict=True)}
    wanted = dict(zip(plain.names, np.asarray(plain.alpha).tolist(), strict=True))
    assert found == pytest.approx(wanted, rel=1e-6)
    tx = farms_jax.tempbalance(refresh_every=every, **({} if every is None else {"axes": axes}))
    state = tx.init(params)
    if every is None:
        state = farms_jax.refresh(state, farms_jax.lr_scale(report, params))
    _, state = jax.jit(tx.update)(params, state, params)
    factors = stacked.by_layer(optax.tree.get(state, "lr_scale"), names)
    wanted = {name: float(own) for name, own in farms_jax.lr_scale(plain, weights.tensors).items()}
    assert {name: float(factor) for name, factor in factors.items()} == pytest.approx(wanted, rel=1e-6)


def test_experts_of_maxtext_are_layers_of_their_own():
    experts = noise(2, LAYERS, WIDTH, 48)
    params = {"decoder": {"layers": {"MoeBlock_0": {"wi_0": experts, "gate": {"kernel": noise(WIDTH, LAYERS, 8)}}}}}
    found = alphas(params, axes=axis_rules.maxtext())
    for layer in range(LAYERS):
        for expert in range(2):
            own = found[f"decoder/layers/MoeBlock_0/wi_0[{layer},{expert}]"]
            assert own == pytest.approx(alphas({"w": experts[expert, layer]})["w"], rel=1e-6)


def test_big_vision_scans_its_blocks_and_has_vectors_that_are_no_layers():
    block = {"MultiHeadDotProductAttention_0": attention_params(LAYERS)["attention"]}
    params = {"Transformer": {"encoderblock": block}, "pos_embedding": noise(1, 16, WIDTH), "cls": noise(1, 1, WIDTH)}
    report = farms_jax.analyze(params, axes=axis_rules.big_vision())
    assert len(report.names) == 2 * LAYERS
    assert {name for name, _ in report.left_out} >= {"pos_embedding", "cls"}


def test_seeds_are_a_stack_of_every_leaf():
    seeds = [attention_params() for _ in range(2)]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    found = alphas(params, stack=0)
    for i, own in enumerate(seeds):
        assert_same({name: found[f"{name}[{i}]"] for name in as_2d(own)}, alphas(own))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(48, name="up")(x))), None


def test_nnx_attention_is_recognised():
    module = nnx.MultiHeadAttention(HEADS, WIDTH, qkv_features=HEADS * SIZE, rngs=nnx.Rngs(0), decode=False)
    state = nnx.state(module, nnx.Param)
    assert [name for name in farms_jax.analyze(state).names] == [
        f"{n}/kernel" for n in ("key", "out", "query", "value")
    ]
    assert np.shape(farms_jax.lr_scale(farms_jax.analyze(state), state)["query"]["bias"][...]) == ()


def test_linen_scan_is_a_stack():
    net = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)(name="blocks")
    params = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 5, WIDTH)), None)["params"]
    found = alphas(params, stack=0)
    assert len(found) == 6 * LAYERS
    for i in range(LAYERS):
        own = alphas(jax.tree.map(lambda leaf, i=i: leaf[i], params))
        assert_same({name: found[f"{name}[{i}]"] for name in own}, own)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_logical_names_say_what_is_a_stack_and_what_are_heads(library):
    names = {"query": ("embed", "layers", "heads", "kv"), "out": ("heads", "layers", "kv", "embed")}
    shapes = {"query": (WIDTH, LAYERS, HEADS, SIZE), "out": (HEADS, LAYERS, SIZE, WIDTH)}
    arrays = {name: noise(*shape) for name, shape in shapes.items()}
    with nnx.use_eager_sharding(False):
        params = {
            name: {
                "kernel": nn.LogicallyPartitioned(array, names[name])
                if library == "linen"
                else nnx.Param(jnp.asarray(array), out_sharding=names[name], eager_sharding=False)
            }
            for name, array in arrays.items()
        }
    wanted = alphas(arrays, axes={"query": "IOO", "out": "IIO"}, stack=1)
    found = alphas(params, axes=axis_rules.logical_names)
    assert_same(found, {name.replace("[", "/kernel["): alpha for name, alpha in wanted.items()})


def test_equinox_is_read_by_the_types_of_its_modules():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "conv": eqx.nn.Conv1d(16, 20, 3, key=keys[0]),
        "image": eqx.nn.Conv2d(16, 20, 3, key=keys[1]),
        "linear": eqx.nn.Linear(20, 16, key=keys[2]),
        "norm": eqx.nn.LayerNorm((20, 16)),
    }
    params = eqx.filter(model, eqx.is_inexact_array)
    found = alphas(params, axes=axis_rules.equinox)
    assert list(found) == ["conv/weight", "image/weight", "linear/weight"]
    kernel = np.asarray(model["conv"].weight).transpose(2, 1, 0)[None]  # as a kernel of Flax
    assert found["conv/weight"] == pytest.approx(alphas({"conv": kernel})["conv"], rel=1e-6)
    factors = farms_jax.lr_scale(farms_jax.analyze(params, axes=axis_rules.equinox), params)
    assert factors["image"].bias == factors["image"].weight


def test_haiku_layer_stacks_are_known_by_their_name():
    params = {"__layer_stack_no_per_layer/mlp/~/linear_0": {"w": noise(LAYERS, WIDTH, 48), "b": noise(LAYERS, 48)}}
    report = farms_jax.analyze(params)
    assert report.names == tuple(f"__layer_stack_no_per_layer/mlp/~/linear_0/w[{i}]" for i in range(LAYERS))
    (factors,) = farms_jax.lr_scale(report, params).values()
    np.testing.assert_array_equal(factors["b"].ravel(), factors["w"].ravel())
