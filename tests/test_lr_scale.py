"""Learning-rate factors: the rates of the public PyTorch code (fixture `tempbalance_lr`), and degenerate reports."""

import dataclasses
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import DATA, few, load_cases, pairwise, report_of, tail_of, window_of
from torch_weights import from_torch, leaves, load

import farms_jax
from farms_jax._windows import make_grid
from train.models import MODELS

SETTINGS, NUMBERS = load_cases("tempbalance_lr")
KEYS = "net", "fit", "xmin_pos", "filter_zeros", "metric", "lr_min_ratio", "remove_first_layer", "remove_last_layer"
KEYS += "batchnorm", "batchnorm_type", "assign_func", "use_sliding_window", "num_row_samples", "Q_ratio"  # of a case
CASES = SETTINGS["cases"]
NETS = {net["net"]: net for net in SETTINGS["nets"]}
MAPPINGS = {"tb_linear_map": "linear", "tb_sqrt": "sqrt", "tb_log2": "log2", "tb_step": "step"}
FIELDS = {  # theirs -> ours
    "alpha": "alpha",
    "D": "ks_distance",
    "spectral_norm": "largest_eigenvalue",
    "norm": "norm",
    "stable_rank": "stable_rank",
    "alpha_hat": "alpha_hat",
    "eigs_num": "num_eigenvalues",
}
BY_NAME = {r"(.*)bn(.*)\.(weight|bias)": r"\1conv\2.weight"}
NORMS = r".*bn_?\d+|.*shortcut\.1"


@functools.cache
def params_of(net):
    """Parameters as the state dict names them."""
    state = np.load(DATA / f"tempbalance_lr_weights_{net}.npz")
    return {name: state[name] for name in NETS[net]["named_parameters"]}


def weights_in_order(net):
    return [f"{layer['name']}.weight" for layer in NETS[net]["analysed_layers_in_order"]]


def reference_report(case):
    """The reference's own measures of all layers."""
    columns = {ours: NUMBERS[f"{theirs}/{case['layer_metrics']}"] for theirs, ours in FIELDS.items()}
    return report_of(names=weights_in_order(case["net"]), **columns)


def drop_ends(report, case):
    first, *_, last = weights_in_order(case["net"])
    dropped = [first] * case["remove_first_layer"] + [last] * case["remove_last_layer"]
    return report.drop(name.replace(".", r"\.") for name in dropped)


def follow_of(case):
    if not case["batchnorm"]:
        return None
    if case["batchnorm_type"] == "name":
        return BY_NAME
    modules = dict.fromkeys(name.rpartition(".")[0] for name in NETS[case["net"]]["named_parameters"])
    return farms_jax.follow_order(modules, norms=NORMS)


def scale_settings(case):
    return {
        "low": case["lr_min_ratio"],
        "high": case["lr_max_ratio"],
        "mapping": MAPPINGS[case["assign_func"]],
        "metric": FIELDS[case["metric"]],
    }


def assert_rates(case, report, rtol):
    """The rate of every parameter, as built and after `.step()`, which takes another base rate."""
    settings = scale_settings(case)
    scale = farms_jax.lr_scale(report, params_of(case["net"]), follow=follow_of(case), **settings)
    factors = np.array([scale[name] for name in NETS[case["net"]]["named_parameters"]])
    number = case["case"]
    for key, base in (("lr", case["untuned_lr"]), ("lr_after_step", case["step_untuned_lr"])):
        np.testing.assert_allclose(base * factors, NUMBERS[f"{key}/{number}"], rtol=rtol, err_msg=f"{key}/{number}")


@pytest.mark.parametrize("case", pairwise(CASES, *KEYS), ids=lambda case: str(case["case"]))
def test_rates_from_the_reference_measures(case):
    assert_rates(case, drop_ends(reference_report(case), case), rtol=1e-5)


def analysis_of(case):
    """What the analysis depends on: the final layer's window does not matter to the convolutions."""
    return case["net"], window_of(case), tail_of(case)


@functools.cache
def analysed(net, window, tail):
    return farms_jax.analyze(params_of(net), window=window, tail=tail, axes=farms_jax.TORCH_AXES)


def window_exceeds(case):
    """Whether the reference slices the final layer from the end, because its window is larger than the matrix."""
    rows = params_of(case["net"])["linear.weight"].shape[0]
    return case["use_sliding_window"] and case["num_row_samples"] > rows


DIFFERENT = [case for case in CASES if window_exceeds(case) and not case["remove_last_layer"]]
SAME = [case for case in CASES if case not in DIFFERENT]


@pytest.mark.parametrize("case", few(pairwise(SAME, *KEYS), 3), ids=lambda case: str(case["case"]))
def test_rates_from_the_weights(case):
    assert_rates(case, drop_ends(analysed(*analysis_of(case)), case), rtol=1e-3)


@pytest.mark.parametrize("case", pairwise(DIFFERENT, *KEYS), ids=lambda case: str(case["case"]))
def test_rates_where_the_window_exceeds_the_final_layer(case):
    """The reference slices from the end, we take the largest window that fits: both answers, one layer apart."""
    report, theirs = analysed(*analysis_of(case)), reference_report(case)
    matrix = params_of(case["net"])["linear.weight"]
    window, tail = window_of(case), tail_of(case)
    grid = make_grid(window, (1, *matrix.shape), is_kernel=False)
    values = oracle.eigenvalues([matrix[i : i + grid.rows, j : j + grid.cols] for i, j in grid.starts])
    expected = oracle.tail(values, tail.xmin, tail.xmin_pos, tail.bins, tail.min_eigenvalue)[0]
    at = report.names.index("linear.weight")
    np.testing.assert_allclose(report.alpha[at], expected, rtol=1e-3)
    metric = FIELDS[case["metric"]]
    substitute = getattr(theirs, metric)[theirs.names.index("linear.weight")]
    assert abs(substitute / getattr(report, metric)[at] - 1) > 1e-2
    report = dataclasses.replace(report, **{metric: getattr(report, metric).at[at].set(substitute)})
    assert_rates(case, drop_ends(report, case), rtol=1e-3)


FLAX_MODELS = {"resnet18_w0.125_c10": ("resnet18", 0.125), "vgg16_w0.25_c10": ("vgg16", 0.25)}
BOTH_ENDS = {
    (case["net"], case["batchnorm_type"]): case
    for case in CASES
    if case["remove_first_layer"] and case["remove_last_layer"] and case["batchnorm"] and case["use_sliding_window"]
}


@pytest.mark.parametrize("norms_by", ["name", "order"])
@pytest.mark.parametrize("net", FLAX_MODELS)
def test_rates_of_the_flax_networks_by_their_own_rules(net, norms_by):
    case, (model_name, width) = BOTH_ENDS[net, norms_by], FLAX_MODELS[net]
    state = dict(np.load(DATA / f"tempbalance_lr_weights_{net}.npz"))
    arrays = from_torch(model_name, state)
    architecture = MODELS[model_name]
    model = nnx.eval_shape(lambda: architecture.build(num_classes=10, width=width, rngs=nnx.Rngs(0)))
    load(model, arrays)
    params = nnx.state(model, nnx.Param)
    report = farms_jax.analyze(params, window=window_of(case), tail=tail_of(case), exclude=architecture.exclude)
    follow = architecture.follow if norms_by == "name" else architecture.follow_order
    scale = farms_jax.lr_scale(report, params, follow=follow, **scale_settings(case))
    assert isinstance(scale, nnx.State)
    assert jax.tree.structure(scale) == jax.tree.structure(params)
    factors = {name: float(factor) for name, factor in leaves(scale).items()}
    ours = dict(zip((name for name in state if not name.endswith("num_batches_tracked")), arrays, strict=True))
    rates = [case["untuned_lr"] * factors[ours[name]] for name in NETS[net]["named_parameters"]]
    np.testing.assert_allclose(rates, NUMBERS[f"lr/{case['case']}"], rtol=1e-3)


def factors_of(report, **settings):
    """Factors of a report's layers, in order."""
    scale = farms_jax.lr_scale(report, dict.fromkeys(report.names, 0.0), **settings)
    return np.array([scale[name] for name in report.names])


SIGMOIDS = pairwise(SETTINGS["sigmoid"], "alphas", "exp_temp", "sigmoid_min", "sigmoid_max", "base")


@pytest.mark.parametrize("case", SIGMOIDS, ids=lambda case: str(case["out"]))
def test_sigmoid_rates(case):
    alphas = NUMBERS[f"sigmoid_alphas/{case['alphas']}"]
    factors = factors_of(
        report_of(names=[f"{i}.weight" for i in range(len(alphas))], alpha=alphas),
        low=10 ** (-case["sigmoid_min"] / 2),
        high=10 ** (case["sigmoid_max"] / 2),
        mapping=functools.partial(farms_jax.mappings.sigmoid, slope=case["exp_temp"]),
    )
    np.testing.assert_allclose(case["base"] * factors, NUMBERS[f"sigmoid_out/{case['out']}"], rtol=1e-5)


# --- Degenerate reports, names and errors, on made-up reports.

ALL_MAPPINGS = list(farms_jax.mappings.NAMED)


def scales_of(alphas, **settings):
    """Factors of layers a, b, c, ... with these alphas."""
    names = [f"{letter}/kernel" for letter in "abcdefgh"[: len(alphas)]]
    return factors_of(report_of(names=names, alpha=alphas), **settings)


@pytest.mark.parametrize("mapping", ALL_MAPPINGS)
def test_equal_scores_leave_every_factor_1(mapping):
    """All equal, one layer, no tail anywhere: the reference's `tb_linear_map` gives every layer the maximum, 1.5."""
    for alphas in ([2.5] * 8, [3.1], [0.0] * 8, [0.0, 2.2] + [0.0] * 6):
        np.testing.assert_array_equal(scales_of(alphas, mapping=mapping), 1.0)
    # The mean of equal numbers differs from them by rounding: that is no range to stretch.
    for alpha in (1.9, 2.7, 3.3, 6.7):
        np.testing.assert_array_equal(scales_of([alpha] * 7 + [0.0], mapping=mapping), 1.0, err_msg=f"alpha {alpha}")


def test_no_layers():
    params = {"bias": jnp.zeros(3), "nested": {"scale": jnp.ones(2)}}
    scale = farms_jax.lr_scale(farms_jax.analyze(params), params)
    assert jax.tree.structure(scale) == jax.tree.structure(params)
    assert jax.tree.leaves(scale) == [1.0, 1.0]


@pytest.mark.parametrize("mapping", ALL_MAPPINGS)
def test_a_layer_without_a_tail_keeps_1_and_does_not_move_the_others(mapping):
    alphas = [2.0, 5.0, 3.0, 3.5]
    alone = scales_of(alphas, mapping=mapping)
    assert np.ptp(alone) > 0.3
    for position in (0, 2, 4):
        together = scales_of(np.insert(alphas, position, 0.0), mapping=mapping)
        assert together[position] == 1.0
        np.testing.assert_allclose(np.delete(together, position), alone, rtol=1e-6)


def test_custom_mapping():
    def inverse(scores, low, high):
        return low + high / scores

    np.testing.assert_allclose(scales_of([2.0, 4.0, 8.0], mapping=inverse, low=0.1, high=2.0), [1.1, 0.6, 0.35])


def test_metric_is_the_score():
    report = report_of(names=["a/kernel", "b/kernel"], alpha=[2.0, 3.0], stable_rank=[9.0, 4.0])
    assert factors_of(report, metric="stable_rank").tolist() == [1.5, 0.5]


@pytest.mark.parametrize("metric", ["alpha_hat", "xmin"])
@pytest.mark.parametrize("mapping", ["sqrt", "log2"])
def test_factors_are_finite_and_not_negative_for_scores_below_0_and_1(mapping, metric):
    """`alpha_hat` is negative where the largest eigenvalue is below 1, and the logarithm of a small score is too."""
    report = report_of(names=["a/kernel", "b/kernel"], alpha_hat=[-0.5, 1.5], xmin=[0.25, 2.0])
    factors = factors_of(report, mapping=mapping, metric=metric)
    assert np.isfinite(factors).all() and (factors >= 0).all()


LAYERS = report_of(names=["a/kernel", "b/kernel"], alpha=[2.0, 3.0])


@pytest.mark.parametrize(
    ("alphas", "others", "expected"),
    [
        # A bias follows the kernel of its module; what is alone follows nothing.
        ({"a/kernel": 2.0, "b/kernel": 3.0}, dict.fromkeys(["a/bias", "b/bias", "norm/scale"], 0.0), [0.5, 1.5, 1.0]),
        # A weight that was left out of the report keeps 1 beside a balanced one in its module.
        ({"attn/q": 2.0, "out/kernel": 3.0}, {"attn/k": np.ones((2, 2))}, [1.0]),
        # A bias of a module with two weights follows neither.
        ({"w1": 2.0, "w2": 3.0}, {"b1": 0.0, "b2": 0.0}, [1.0, 1.0]),
    ],
)
def test_leaves_beside_layers(alphas, others, expected):
    report = report_of(names=alphas, alpha=list(alphas.values()))
    scale = farms_jax.lr_scale(report, dict.fromkeys(alphas, np.ones((2, 2))) | others)
    assert [float(scale[name]) for name in (*alphas, *others)] == [0.5, 1.5, *expected]
    assert {(leaf.dtype, leaf.shape) for leaf in scale.values()} == {(jnp.dtype(jnp.float32), ())}


@pytest.mark.parametrize("template", [r"\1/kernel", r"\1"])
def test_follow_by_name_takes_a_layer_or_its_module(template):
    params = {"a": {"kernel": 0.0}, "b": {"kernel": 0.0}, "a_norm": {"scale": 0.0, "bias": 0.0}, "c_norm": {"scale": 0}}
    scale = farms_jax.lr_scale(LAYERS, params, follow={r"(.*)_norm/(scale|bias)": template})
    assert scale["a_norm"] == {"scale": 0.5, "bias": 0.5}
    assert scale["c_norm"] == {"scale": 1.0}  # follows `c`, which is not balanced


def test_follow_order_of_layer_norms():
    """Each norm follows the layer before it: norms first or after another norm follow nothing."""
    names = ["wte/embedding", "blocks/0/attn/kernel", "blocks/0/mlp/kernel"]
    norms = ["ln_in", "blocks/0/ln1", "blocks/0/ln2", "blocks/0/ln3", "ln_f"]
    modules = ["ln_in", "wte", "blocks/0/ln1", "blocks/0/attn", "blocks/0/ln2", "blocks/0/ln3", "blocks/0/mlp", "ln_f"]
    params = dict.fromkeys([*names, *(f"{norm}/scale" for norm in norms)], 0.0)
    follow = farms_jax.follow_order(modules, norms=r".*ln\w+")
    for alphas, expected in (([2.0, 3.0, 4.0], [1, 0.5, 1, 1, 1.5]), ([3.0, 2.0, 4.0], [1, 1, 0.5, 1, 1.5])):
        scale = farms_jax.lr_scale(report_of(names=names, alpha=alphas), params, follow=follow)
        assert [float(scale[f"{norm}/scale"]) for norm in norms] == expected


def test_every_model_style_gets_a_tree_like_itself():
    rngs, norm = nnx.Rngs(0), {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    nnx_model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=rngs) for _ in range(3)), nnx.LayerNorm(8, rngs=rngs))
    kernels = [layer.kernel[...] for layer in nnx_model.layers[:3]]
    linen = {f"layers_{i}": {"kernel": kernel, "bias": jnp.zeros(8)} for i, kernel in enumerate(kernels)}
    equinox = eqx.nn.Sequential([*(eqx.nn.Linear(8, 8, key=jax.random.key(0)) for _ in kernels), eqx.nn.LayerNorm(8)])
    equinox = eqx.tree_at(lambda m: [m.layers[i].weight for i in range(3)], equinox, [kernel.T for kernel in kernels])
    found = []
    for params, axes in (
        (linen | {"layers_3": norm}, farms_jax.FLAX_AXES),
        (eqx.filter(equinox, eqx.is_array), farms_jax.TORCH_AXES),
        (nnx.state(nnx_model, nnx.Param), farms_jax.FLAX_AXES),
        (nnx_model, farms_jax.FLAX_AXES),
    ):
        scale = farms_jax.lr_scale(farms_jax.analyze(params, axes=axes), params, low=0.7, high=1.3)
        assert jax.tree.structure(scale) == jax.tree.structure(params)
        assert type(scale) is type(params)
        factors = {name.replace("layers_", "layers/"): float(leaf) for name, leaf in farms_jax.named_leaves(scale)}
        found.append({re.sub("weight|scale", "kernel", name): factor for name, factor in factors.items()})
    factors = found[0]
    assert [min(factors.values()), max(factors.values())] == pytest.approx([0.7, 1.3])
    assert all(factors[f"layers/{i}/bias"] == factors[f"layers/{i}/kernel"] for i in range(4))
    assert factors["layers/3/kernel"] == 1
    assert [others == pytest.approx(factors) for others in found] == [True] * 4


def test_bounds_may_be_traced():
    params = dict.fromkeys(LAYERS.names, 0.0)
    scale = jax.jit(lambda low, high: farms_jax.lr_scale(LAYERS, params, low=low, high=high))(0.3, 1.7)
    np.testing.assert_allclose([scale["a/kernel"], scale["b/kernel"]], [0.3, 1.7], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"mapping must be a function or one of linear, sqrt, .*; got 'cubic'"):
        factors_of(LAYERS, mapping="cubic")
    with pytest.raises(ValueError, match=r"metric must be one of alpha, ks_distance, .*; got 'names'"):
        factors_of(LAYERS, metric="names")
    for low, high in ((1.5, 0.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match=f"0 < low <= high, got {low} and {high}"):
            factors_of(LAYERS, low=low, high=high)
    with pytest.raises(ValueError, match=r"params has no 'b/kernel', which the report has; pass the analysed params"):
        farms_jax.lr_scale(LAYERS, {"a/kernel": 0.0})
