"""The optax contract of `tempbalance`, mostly with a toy measure: cheap, and its answers are known."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import farms_jax
from farms_jax import TempBalanceState, Window


def toy_scale(params):
    """Factor 1 + mean |weight|: depends on the parameters, differs by leaf, and by layer of a stack (three axes)."""

    def factor(weight):
        stacked = weight.ndim == 3
        return 1 + jnp.abs(weight).mean((1, 2) if stacked else None, keepdims=stacked)

    return jax.tree.map(factor, params)


def toy_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "blocks": {"kernel": jax.random.normal(keys[2], (2, 4, 3), dtype)},
        "dense1": {"kernel": jax.random.normal(keys[0], (4, 3), dtype), "bias": jnp.full(3, 0.25, dtype)},
        "dense2": {"kernel": jax.random.normal(keys[1], (3, 2), dtype), "bias": jnp.full(2, -0.5, dtype)},
        "norm": {"scale": jnp.ones(3, dtype)},
    }


def toy_grads(params, step=0):
    return jax.tree.map(lambda weight: 0.3 * weight + jnp.asarray(0.1 * (step + 1), weight.dtype), params)


STACK = {"blocks/.*": 0}
FACTORS = {
    "blocks": {"kernel": np.array([0.8, 1.4]).reshape(2, 1, 1)},
    "dense1": {"kernel": 0.5, "bias": 0.75},
    "dense2": {"kernel": 1.5, "bias": 1.25},
    "norm": {"scale": 1.0},
}


def balance_by_hand():
    return farms_jax.tempbalance(refresh_every=None, stack=STACK)


def assert_close(actual, desired, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for (name, a), (_, b) in zip(farms_jax.named_leaves(actual), farms_jax.named_leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol, atol, err_msg=name)


def lr_scale_of(opt_state):
    return optax.tree.get(opt_state, "lr_scale")


def types_of(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def test_starts_with_ones_and_a_zero_count():
    params = toy_params()
    state = farms_jax.tempbalance(refresh_every=None).init(params)
    assert isinstance(state, TempBalanceState)
    assert (state.count, state.count.dtype) == (0, jnp.int32)
    assert_close(state.hyperparams["lr_scale"], jax.tree.map(lambda _: 1.0, params))
    assert all(leaf.dtype == jnp.float32 and leaf.shape == () for leaf in jax.tree.leaves(state.hyperparams))
    for settings in ({"refresh_every": 3, "low": 0.6}, {"refresh_every": None}):
        tx = optax.chain(optax.sgd(0.1, momentum=0.9), farms_jax.tempbalance(**settings, stack=STACK))
        shapes = jax.eval_shape(tx.init, jax.eval_shape(toy_params))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == types_of(tx.init(params))
        assert types_of(lr_scale_of(tx.init(params))) == types_of(jax.tree.map(jnp.float32, FACTORS))


# --- The rule of refresh_every.


def test_measures_at_updates_0_n_2n_and_at_no_other():
    runs, seen, every = [], [], 3

    def counting_scale(params):
        jax.debug.callback(lambda: runs.append(1))
        return toy_scale(params)

    params = toy_params()
    tx = optax.chain(optax.sgd(0.1), farms_jax.tempbalance(counting_scale, refresh_every=every))
    opt_state = tx.init(params)
    step = jax.jit(lambda grads, opt_state, params: tx.update(grads, opt_state, params, unknown_extra_argument=1))
    for count in range(7):
        seen.append(toy_scale(params))
        grads = toy_grads(params, count)
        updates, opt_state = step(grads, opt_state, params)
        factors = seen[count // every * every]  # what is measured serves the same update
        assert_close(updates, jax.tree.map(lambda grad, factor: -0.1 * grad * factor, grads, factors), rtol=1e-5)
        assert_close(lr_scale_of(opt_state), factors)
        params = optax.apply_updates(params, updates)
    first = [scale["dense1"]["kernel"] for scale in seen]
    assert len(set(map(float, first))) == 7  # another answer at every step, so the check above can fail
    jax.effects_barrier()
    assert len(runs) == len(range(0, 7, every))


# --- One compilation; stable types.


@pytest.mark.parametrize("every", [None, 2])
def test_compiles_once(every):
    """Not again at the second call, nor after factors were written by `refresh` or `optax.tree.set`."""
    traces = []
    params = toy_params()
    balance = farms_jax.tempbalance(toy_scale, refresh_every=2) if every else balance_by_hand()
    tx = optax.chain(optax.adamw(0.1), balance)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, opt_state, params):
        traces.append(1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(2):
        params, opt_state = step(toy_grads(params), opt_state, params)
    opt_state = farms_jax.refresh(opt_state, FACTORS)
    params, opt_state = step(toy_grads(params), opt_state, params)
    opt_state = farms_jax.refresh(opt_state, jax.tree.map(np.float64, FACTORS))
    params, opt_state = step(toy_grads(params), opt_state, params)
    new = jax.tree.map(lambda factor: jnp.asarray(2 * factor, jnp.float32), FACTORS)
    step(toy_grads(params), optax.tree.set(opt_state, lr_scale=new), params)
    assert len(traces) == 1


def test_factors_are_read_and_set_as_hyperparameters():
    params = toy_params()
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(1.0))
    tx = optax.chain(sgd, farms_jax.tempbalance(refresh_every=None))
    opt_state = tx.init(params)
    grads = toy_grads(params)
    expected = jax.tree.map(lambda grad, factor: -grad * factor, grads, FACTORS)
    by_tree_set = optax.tree.set(opt_state, lr_scale=FACTORS)
    by_replace = (opt_state[0], opt_state[1]._replace(hyperparams={"lr_scale": jax.tree.map(jnp.float32, FACTORS)}))
    by_refresh = farms_jax.refresh(opt_state, FACTORS)
    for new_state in (by_tree_set, by_replace, by_refresh):
        for update in (tx.update, jax.jit(tx.update)):
            updates, after = update(grads, new_state)  # no parameters needed
            assert_close(updates, expected)
            assert_close(lr_scale_of(after), FACTORS)
            assert after[1].count == 1
    assert_close(lr_scale_of(opt_state), jax.tree.map(lambda _: 1.0, FACTORS))  # nothing is changed in place
    rate = optax.tree.get(opt_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array))
    assert float(rate * lr_scale_of(by_refresh)["dense2"]["kernel"]) == pytest.approx(1.5)  # the rate of a leaf


# --- With optax's optimizers and wrappers.

OPTIMIZERS = {
    "nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "decay and momentum": lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, momentum=0.9)),
    "injected": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_one_optimizer_per_leaf_at_its_own_rate(name):
    make = OPTIMIZERS[name]

    def rate(factor):
        return optax.linear_schedule(0.1 * factor, 0.02 * factor, 4)

    params = toy_params()
    tx = optax.chain(make(rate(1.0)), farms_jax.tempbalance(refresh_every=None))
    opt_state = farms_jax.refresh(tx.init(params), FACTORS)
    names = [name for name, _ in farms_jax.named_leaves(params)]
    labels = jax.tree.unflatten(jax.tree.structure(params), names)
    rates = dict(zip(names, jax.tree.leaves(FACTORS), strict=True))
    by_leaf = optax.multi_transform({label: make(rate(factor)) for label, factor in rates.items()}, labels)
    leaf_state, leaf_params = by_leaf.init(params), params
    for count in range(4):
        updates, opt_state = tx.update(toy_grads(params, count), opt_state, params)
        params = optax.apply_updates(params, updates)
        updates, leaf_state = by_leaf.update(toy_grads(leaf_params, count), leaf_state, leaf_params)
        leaf_params = optax.apply_updates(leaf_params, updates)
    assert_close(params, leaf_params, rtol=1e-5, atol=1e-7)


def test_numbers_may_be_injected():
    """`low` and `high` become visible state, and move the factors."""

    def balanced(low, high):
        return farms_jax.tempbalance(refresh_every=1, low=low, high=high)

    params = {name: {"kernel": jax.random.normal(jax.random.key(seed), (8, 8))} for seed, name in enumerate("ab")}
    tx = optax.inject_hyperparams(balanced)(low=0.5, high=1.5)
    state = optax.tree.set(tx.init(params), low=jnp.float32(0.9), high=jnp.float32(1.2))
    _, state = jax.jit(tx.update)(params, state, params)
    assert sorted(jax.tree.leaves(lr_scale_of(state))) == pytest.approx([0.9, 1.2])


def test_under_masked_the_others_are_never_seen():
    params = toy_params()
    mask = {"dense1": {"kernel": True, "bias": True}, "dense2": {"kernel": False, "bias": False}, "norm": {"scale": 0}}
    mask = jax.tree.map(bool, mask | {"blocks": {"kernel": True}})
    inner = farms_jax.tempbalance(toy_scale, refresh_every=2)
    tx = optax.chain(optax.sgd(1.0), optax.masked(inner, mask))
    opt_state = tx.init(params)
    grads = toy_grads(params)
    updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    factors = jax.tree.map(lambda factor, ours: factor if ours else 1.0, toy_scale(params), mask)
    assert_close(updates, jax.tree.map(lambda grad, factor: -grad * factor, grads, factors))
    assert len(jax.tree.leaves(lr_scale_of(opt_state))) == 3
    masked_factors = jax.tree.map(lambda factor, ours: factor if ours else optax.MaskedNode(), FACTORS, mask)
    opt_state = farms_jax.refresh(opt_state, masked_factors)
    assert_close(lr_scale_of(opt_state)["dense1"], FACTORS["dense1"])


def test_multi_steps_measures_once_per_applied_update():
    params = toy_params()
    tx = optax.MultiSteps(
        optax.chain(optax.sgd(0.1), farms_jax.tempbalance(toy_scale, refresh_every=2)), every_k_schedule=3
    )
    opt_state = tx.init(params)
    step = jax.jit(lambda grads, opt_state, params: tx.update(grads, opt_state, params))
    measured = []
    for count in range(9):
        before = params
        updates, opt_state = step(toy_grads(before), opt_state, before)
        params = optax.apply_updates(before, updates)
        measured.append(toy_scale(before))
        if count < 2:
            assert_close(params, before)
            assert_close(lr_scale_of(opt_state), jax.tree.map(lambda _: 1.0, params))
    assert optax.tree.get(opt_state, "TempBalanceState").count == 3
    assert_close(lr_scale_of(opt_state), measured[8])  # the 3rd applied update is number 2, at step 8
    assert_close(lr_scale_of(farms_jax.refresh(opt_state, FACTORS)), FACTORS)


def test_map_params_meets_a_factor_for_every_parameter():
    params = toy_params()
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), optax.masked(balance_by_hand(), jax.tree.map(lambda _: True, params))
    )
    names = jax.tree.unflatten(jax.tree.structure(params), [name for name, _ in farms_jax.named_leaves(params)])
    mapped = optax.tree.map_params(tx, lambda leaf, name: (name, leaf.ndim), tx.init(params), names)
    assert optax.tree.get(mapped, "trace") == jax.tree.map(lambda name, leaf: (name, leaf.ndim), names, params)
    assert lr_scale_of(mapped) == jax.tree.map(lambda name, factor: (name, np.ndim(factor)), names, FACTORS)
    assert mapped[-1].inner_state.count == 0


def test_vmap_over_seeds():
    tx = farms_jax.tempbalance(refresh_every=None)
    both = jax.tree.map(lambda weight: jnp.stack([weight, 2 * weight]), toy_params())
    scales = jax.tree.map(lambda factor: jnp.array([factor, 3 * factor]), FACTORS)
    states = jax.vmap(farms_jax.refresh)(jax.vmap(tx.init)(both), scales)
    updates, _ = jax.vmap(tx.update)(both, states)
    assert_close(
        updates,
        jax.tree.map(lambda weight, factor: jnp.stack([weight[0] * factor, weight[1] * 3 * factor]), both, FACTORS),
    )


def test_bfloat16_updates_stay_bfloat16():
    params = toy_params(jnp.bfloat16)
    tx = farms_jax.tempbalance(lambda _: FACTORS, refresh_every=1)
    grads = toy_grads(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(lr_scale_of(state))} == {jnp.dtype(jnp.float32)}
    assert_close(updates, jax.tree.map(lambda grad, factor: grad * jnp.bfloat16(factor), grads, FACTORS))


def test_gradients_without_a_leaf():
    """Equinox models have `None` where there is no array."""
    params = {"weight": jnp.ones((2, 2)), "bias": None}
    tx = farms_jax.tempbalance(toy_scale, refresh_every=1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["bias"] is None
    np.testing.assert_array_equal(updates["weight"], 2 * np.ones((2, 2)))


# --- nnx.Optimizer.


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 24, rngs=rngs)
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.second = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.norm(self.first(x))))


NNX_SCALE = {"low": 0.25, "high": 4.0, "follow": {r"norm/.*": "first/kernel"}}


@pytest.mark.parametrize("every", [None, 2])
def test_nnx_optimizer_keeps_its_variables_and_uses_the_factors(every):
    model, settings = TwoLayers(nnx.Rngs(0)), NNX_SCALE if every else {}
    tx = optax.chain(optax.sgd(0.1), farms_jax.tempbalance(refresh_every=every, **settings))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    old, scale = jax.tree.map(jnp.copy, params), farms_jax.measure_scale(params, **NNX_SCALE)
    if every is None:
        before = optimizer.opt_state
        optimizer.opt_state = farms_jax.refresh(before, scale)
        assert jax.tree.structure(optimizer.opt_state) == jax.tree.structure(before)
        assert kinds(optimizer.opt_state) == kinds(before)
        assert any(issubclass(kind, nnx.Variable) for kind in kinds(before))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    step(model, optimizer)
    moved = jax.tree.map(lambda old, new: (old - new).mean(), old, nnx.state(model, nnx.Param))
    moved, scale = nnx.to_pure_dict(moved), nnx.to_pure_dict(scale)
    assert_close(moved, jax.tree.map(lambda factor: 0.1 * factor, scale), rtol=1e-4)
    assert sorted({round(float(leaf), 4) for leaf in jax.tree.leaves(moved)}) == [0.025, 0.4]


def kinds(tree):
    return [type(leaf) for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))]


# --- Both doors lead to the same training.


def conv_params():
    keys = jax.random.split(jax.random.key(1), 5)
    return {
        "blocks": {"kernel": 0.3 * jax.random.t(keys[4], 4, (2, 24, 24)), "bias": jnp.zeros((2, 24))},
        "conv": {"kernel": 0.2 * jax.random.normal(keys[0], (3, 3, 8, 16)), "bias": jnp.zeros(16)},
        "norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)},
        "hidden": {"kernel": 0.3 * jax.random.normal(keys[1], (16, 24)), "bias": jnp.zeros(24)},
        "middle": {"kernel": 0.3 * jax.random.t(keys[2], 2.5, (24, 24)), "bias": jnp.zeros(24)},
        "head": {"kernel": 0.3 * jax.random.normal(keys[3], (24, 8)), "bias": jnp.zeros(8)},
    }


OF_ANALYSIS = {"window": Window(rows=12, per_axis=3), "exclude": r"head/.*", "kernel_scale": 0.4, "stack": STACK}
OF_SCALE = {"low": 0.3, "high": 2.0, "follow": {r"norm/.*": "conv/kernel"}}


def chain(**settings):
    balance = farms_jax.tempbalance(**settings)
    return optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.5, momentum=0.9), balance)


def train(tx, refresh_every=None):
    """Parameters and factors of five steps, refreshed between steps or by `tx` itself."""

    @jax.jit
    def step(carry, _):
        params, opt_state = carry
        grads = jax.tree.map(lambda weight: jnp.tanh(3 * weight), params)  # not linear, so that spectra change
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), lr_scale_of(opt_state)

    params = conv_params()
    carry, scales = (params, tx.init(params)), []
    if refresh_every is None:
        (params, _), scales = jax.lax.scan(step, carry, length=5)
        return params, scales
    for count in range(5):
        params, opt_state = carry
        if count % refresh_every == 0:
            report = farms_jax.analyze(params, **OF_ANALYSIS)
            opt_state = farms_jax.refresh(opt_state, farms_jax.lr_scale(report, params, **OF_SCALE))
        carry, scale = step((params, opt_state), None)
        scales.append(scale)
    return carry[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *scales)


def test_both_doors_train_alike():
    by_refresh, expected = train(chain(refresh_every=None), refresh_every=2)
    params, scales = train(chain(refresh_every=2, **OF_ANALYSIS, **OF_SCALE))
    assert_close(scales, expected, rtol=1e-3)
    assert_close(params, by_refresh, rtol=1e-4, atol=1e-5)
    of_leaf = dict(farms_jax.named_leaves(scales))
    assert set(np.asarray(of_leaf["head/kernel"])) == {1.0}
    np.testing.assert_array_equal(of_leaf["norm/scale"], of_leaf["conv/kernel"])
    hidden = np.asarray(of_leaf["hidden/kernel"])  # measured at 0, 2, 4; the weights move, and the factor with them
    assert hidden[0] == hidden[1] and hidden[2] == hidden[3]
    spread = np.vstack([
        np.reshape(of_leaf[f"{name}/kernel"], (5, -1)).T for name in ("blocks", "conv", "hidden", "middle")
    ])
    np.testing.assert_array_equal(of_leaf["blocks/bias"][..., 0], of_leaf["blocks/kernel"][..., 0, 0])
    np.testing.assert_allclose([spread.min(), spread.max()], [0.3, 2.0], rtol=1e-5)
    assert len({tuple(np.asarray(column)) for column in spread[:, ::2].T}) == 3
    plain, _ = train(chain(refresh_every=None))
    assert np.abs(plain["middle"]["kernel"] - params["middle"]["kernel"]).max() > 1e-2  # another training


# --- Errors and checkpoints.


def test_refresh_needs_a_state():
    params = toy_params()
    with pytest.raises(ValueError, match=r"refresh: no TempBalanceState in opt_state; add farms_jax.tempbalance\("):
        farms_jax.refresh(optax.adamw(0.1).init(params), FACTORS)


def test_what_does_not_fit_the_parameters_is_refused():
    params = toy_params()
    tx = farms_jax.tempbalance(lambda params: params["dense1"], refresh_every=1)
    state = tx.init(params)
    with pytest.raises(ValueError, match="scale: no factor for 'blocks/kernel'"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=re.escape("call tx.update(grads, opt_state, params): it measures params")):
        tx.update(params, state)
    other_names = {"a": {"x": 2.0, "y": 3.0}, "b": {"x": 4.0, "y": 5.0}, "c": {"x": 6.0}, "d": 7.0}  # as many leaves
    state = balance_by_hand().init(params)
    for scale, message in (
        (FACTORS["dense1"], "scale: no factor for 'blocks/kernel'"),
        (other_names, "scale: no factor for 'blocks/kernel'"),
    ):
        with pytest.raises(ValueError, match=message):
            farms_jax.refresh(state, scale)
    for other, message in (
        ({"norm": {"scale": jnp.ones(4)}}, "the factor of norm/scale has shape (4,), which does not broadcast to (3,)"),
        ({"blocks": {"kernel": jnp.ones((3, 1, 1))}}, "blocks/kernel has shape (3, 1, 1), which does not broadcast"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            balance_by_hand().update(params, farms_jax.refresh(state, FACTORS | other), params)


def test_factors_go_by_name_not_by_position():
    """Layers numbered by integers, as in an NNX state, and by strings, as in a checkpoint, flatten in other orders."""
    state = farms_jax.tempbalance(refresh_every=None).init({2: jnp.ones(3), 10: jnp.ones(4)})
    scale = lr_scale_of(farms_jax.refresh(state, {"2": 0.2, "10": 1.0}))
    assert {key: round(float(factor), 6) for key, factor in scale.items()} == {2: 0.2, 10: 1.0}


def test_settings_are_checked_at_once():
    for every in (0, 2.5):
        with pytest.raises(ValueError, match=f"refresh_every must be .*got {every}"):
            farms_jax.tempbalance(refresh_every=every)
    with pytest.raises(ValueError, match="high, low would have no effect here: scale_fn replaces them"):
        farms_jax.tempbalance(toy_scale, refresh_every=2, low=0.6, high=1.4)
    with pytest.raises(ValueError, match="low would have no effect here: pass them to lr_scale and analyze before"):
        farms_jax.tempbalance(refresh_every=None, low=0.6)
    with pytest.raises(TypeError, match="unknown setting 'windows'; known are window, tail,"):
        farms_jax.tempbalance(refresh_every=2, windows=Window())
    with pytest.raises(TypeError, match="refresh_every"):
        farms_jax.tempbalance()
    with pytest.raises(TypeError, match=r"refresh_every must be a number of Python.*static_args"):
        optax.inject_hyperparams(farms_jax.tempbalance)(refresh_every=2).init(toy_params())


@pytest.mark.parametrize("every", [None, 2])
def test_orbax_round_trip(tmp_path, every):
    params = toy_params()
    balance = farms_jax.tempbalance(toy_scale, refresh_every=every) if every else balance_by_hand()
    tx = optax.chain(optax.adamw(0.1), balance)
    opt_state = farms_jax.refresh(tx.init(params), FACTORS)
    for count in range(3):
        updates, opt_state = tx.update(toy_grads(params, count), opt_state, params)
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_close(restored, opt_state, rtol=0)
    assert types_of(restored) == types_of(opt_state)
    assert restored[-1].count == 3
