"""`tempbalance` in the training loops that people have: donated, sharded, in groups, scheduled, restored states."""

import functools

import flax.jax_utils
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import farms_jax

RNG = np.random.default_rng(0)
SHAPES = {"dense_0": (32, 48), "dense_1": (48, 40), "head": (40, 16)}
OF_STACK: dict = {"stack": {"blocks/.*": 0}}
FROZEN = {"dense_0": "trained", "dense_1": "trained", "head": "frozen"}


def make_params():
    return {
        name: {"kernel": jnp.asarray(RNG.standard_normal(shape), jnp.float32), "bias": jnp.zeros(shape[1])}
        for name, shape in SHAPES.items()
    }


def loss(params):
    x = jnp.ones((4, 32))
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x**2).mean()


def measured(params):
    return farms_jax.lr_scale(farms_jax.analyze(params), params)


def kernels(scale):
    return {name: float(layer["kernel"]) for name, layer in scale.items()}


@pytest.mark.parametrize("written_by", ["refresh", "tree.set"])
def test_a_step_may_donate_its_state(written_by):
    params = make_params()
    tx = optax.chain(optax.adamw(1e-3), farms_jax.tempbalance(refresh_every=None))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    scale = measured(params)
    state = farms_jax.refresh(state, scale) if written_by == "refresh" else optax.tree.set(state, lr_scale=scale)
    wanted = kernels(scale)
    params, state = step(params, state)
    assert kernels(optax.tree.get(state, "lr_scale")) == wanted


def test_one_compilation_over_refreshes_of_a_stack():
    params = {"blocks": {"kernel": jnp.asarray(RNG.standard_normal((3, 32, 32)), jnp.float32)}}
    tx = farms_jax.tempbalance(refresh_every=2, stack={"blocks/.*": 0})
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(5):
        _, state = update(params, state, params)
    assert update._cache_size() == 1


def mesh_of_one():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


def test_the_state_of_annotated_linen_modules_is_sharded_by_their_specs():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model, tx = nn.Dense(48, kernel_init=init), farms_jax.tempbalance(refresh_every=1)

    def begin():
        variables = model.init(jax.random.key(0), jnp.ones((4, 32)))
        return variables, tx.init(variables["params"])

    specs = nn.get_partition_spec(jax.eval_shape(begin))
    shardings = nn.logical_to_mesh_sharding(specs, mesh_of_one(), (("embed", "data"), ("mlp", "model")))
    variables, state = jax.jit(begin, out_shardings=shardings)()
    assert variables["params"]["kernel"].value.sharding.spec == PartitionSpec("data", "model")
    assert state.hyperparams["lr_scale"]["kernel"].sharding.spec == PartitionSpec()
    updates, _ = jax.jit(tx.update)(variables["params"], state, variables["params"])
    np.testing.assert_allclose(updates["kernel"].value, variables["params"]["kernel"].value)  # one layer: factor 1


def test_an_nnx_optimizer_of_annotated_modules_steps_under_a_mesh():
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(i), kernel_init=init) for i in range(2)))
        tx = optax.chain(optax.adamw(1e-3), farms_jax.tempbalance(refresh_every=1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        wanted = measured(nnx.state(model, nnx.Param))
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((2, 32))) ** 2).mean())(model))
    found = dict(farms_jax.named_leaves(optax.tree.get(nnx.as_pure(optimizer.opt_state), "lr_scale")))
    for name, factor in farms_jax.named_leaves(wanted):
        np.testing.assert_allclose(found[name], factor, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("written_by", ["refresh", "tree.set"])
def test_a_scanned_nnx_model_trains_with_a_factor_for_each_block(written_by):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def blocks(rngs):
        return nnx.Linear(32, 32, rngs=rngs)

    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    model.blocks = blocks(nnx.Rngs(1))
    tx = optax.chain(optax.sgd(0.1), farms_jax.tempbalance(refresh_every=None))
    optimizer = nnx.ModelAndOptimizer(model, tx)
    params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    scale = farms_jax.measure_scale(params, **OF_STACK)
    if written_by == "refresh":
        optimizer.opt_state = farms_jax.refresh(optimizer.opt_state, scale)
    else:
        optimizer.opt_state = optax.tree.set(optimizer.opt_state, lr_scale=scale)

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(optimizer):
        optimizer.update(jax.tree.map(jnp.ones_like, nnx.state(optimizer.model, nnx.Param)))

    step(optimizer)
    step(optimizer)
    factors = dict(farms_jax.named_leaves(scale))
    assert factors["blocks/kernel"].shape == (3, 1, 1) and np.ptp(factors["blocks/kernel"]) > 0
    before, after = (dict(farms_jax.named_leaves(each)) for each in (params, nnx.state(model, nnx.Param)))
    for name, factor in farms_jax.named_leaves(optax.tree.get(nnx.as_pure(optimizer.opt_state), "lr_scale")):
        np.testing.assert_array_equal(factor, factors[name], err_msg=name)
        np.testing.assert_allclose(
            before[name] - after[name], np.broadcast_to(0.2 * factor, after[name].shape), rtol=1e-4
        )


def balanced():
    return optax.chain(optax.sgd(0.1), farms_jax.tempbalance(refresh_every=None))


GROUPS = {
    "frozen": lambda: optax.partition({"trained": balanced(), "frozen": optax.set_to_zero()}, FROZEN),
    "masked": lambda: optax.masked(balanced(), {name: group == "trained" for name, group in FROZEN.items()}),
    "two groups": lambda: optax.partition({"trained": balanced(), "frozen": balanced()}, FROZEN),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_refresh_reaches_the_parameters_of_every_group(groups):
    params = make_params()
    scale = measured(params)
    state = farms_jax.refresh(GROUPS[groups]().init(params), scale)
    states = [node for node in jax.tree.leaves(state, is_leaf=is_factors) if is_factors(node)]
    found = dict(pair for node in states for pair in farms_jax.named_leaves(node.hyperparams["lr_scale"]))
    names = SHAPES if groups == "two groups" else ("dense_0", "dense_1")
    assert {name: float(found[f"{name}/kernel"]) for name in names} == {name: kernels(scale)[name] for name in names}
    assert len(found) == 2 * len(names)


def is_factors(node):
    return isinstance(node, farms_jax.TempBalanceState)


def test_frozen_parameters_move_nobody():
    params = make_params()
    tx = optax.masked(
        farms_jax.tempbalance(refresh_every=1), {name: group == "trained" for name, group in FROZEN.items()}
    )
    other = {**params, "head": jax.tree.map(lambda leaf: leaf**3, params["head"])}
    scales = []
    for each in (params, other):
        _, state = tx.update(each, tx.init(each), each)
        scales.append(optax.tree.get(state, "lr_scale"))
    assert scales[0]["dense_0"]["kernel"] == scales[1]["dense_0"]["kernel"]


def test_the_ends_of_the_range_follow_schedules():
    params = make_params()
    balance = optax.inject_hyperparams(farms_jax.tempbalance, static_args="refresh_every")
    tx = balance(refresh_every=1, low=optax.linear_schedule(0.5, 0.9, 4), high=1.5)
    state = tx.init(params)
    for step in range(3):
        _, state = jax.jit(tx.update)(params, state, params)
        found = kernels(optax.tree.get(state.inner_state, "lr_scale"))
        assert min(found.values()) == pytest.approx(0.5 + 0.1 * step) and max(found.values()) == pytest.approx(1.5)


def test_a_gradient_through_an_update_stops_at_the_factors():
    params = make_params()
    scale = measured(params)

    def after(params, tx):
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return loss(optax.apply_updates(params, updates))

    found = jax.grad(after)(params, optax.chain(optax.sgd(0.1), farms_jax.tempbalance(refresh_every=1)))
    fixed = optax.chain(optax.sgd(0.1), farms_jax.tempbalance(lambda _: scale, refresh_every=1))
    wanted = jax.grad(after)(params, fixed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


def test_a_state_restored_without_its_target_is_told_from_one_without_factors():
    params = make_params()
    state = balanced().init(params)
    raw = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    with pytest.raises(ValueError, match="restored without a target; restore it into tx.init"):
        farms_jax.refresh(raw, measured(params))
    with pytest.raises(ValueError, match="add farms_jax.tempbalance"):
        farms_jax.refresh(optax.sgd(0.1).init(params), measured(params))


def test_inside_shard_map_a_measurement_is_an_error():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    measure = jax.shard_map(farms_jax.measure_scale, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    with pytest.raises(ValueError, match="inside shard_map or pmap, here over data, a weight may be a shard"):
        measure(make_params())
    tx = farms_jax.tempbalance(refresh_every=1)
    replicated = flax.jax_utils.replicate(make_params(), jax.devices()[:1])
    step = jax.pmap(lambda params: tx.update(params, tx.init(params), params), "batch", devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="inside shard_map or pmap, here over batch, .* by `refresh`"):
        step(replicated)


def stacked_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"blocks": {"kernel": (3, 32, 32), "bias": (3, 32)}, "head": {"kernel": (32, 24), "bias": (24,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def stacked_factors(seed):
    of_layers = jnp.linspace(0.5, 1.5, 3) * (1 + seed)
    return {
        "blocks": {"kernel": of_layers[:, None, None], "bias": of_layers[:, None]},
        "head": {"kernel": jnp.float32(2.0), "bias": jnp.float32(2.0)},
    }


@pytest.mark.parametrize("factors", [[stacked_factors(0), stacked_factors(1)], [stacked_factors(0)]])
def test_refresh_of_a_training_for_each_seed(factors):
    """Seeds come first in the state, before the stack of layers that only the new factors have."""
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), stacked_params(0), stacked_params(1))
    # Factors of each seed, or the same for all of them.
    written = jax.tree.map(lambda *leaves: jnp.stack(leaves), *factors) if len(factors) == 2 else factors[0]
    tx = farms_jax.tempbalance(refresh_every=None)
    state = jax.vmap(tx.init)(params)
    for _ in range(2):  # the second time into factors of their own shape
        updates, state = jax.vmap(tx.update)(params, farms_jax.refresh(state, written))
        for seed in range(2):
            wanted = jax.tree.map(jnp.multiply, stacked_params(seed), factors[seed % len(factors)])
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[seed], updates), wanted)  # noqa: B023


@pytest.mark.parametrize("settings", [{}, {"range_quantiles": (0.1, 0.9)}, {"mapping": "sqrt"}])
def test_no_nan_is_computed_on_the_way(settings):
    params = stacked_params()
    flat = jax.tree.map(jnp.zeros_like, params)
    wanted, without_tail = (farms_jax.measure_scale(each, **OF_STACK, **settings) for each in (params, flat))
    with jax.debug_nans(True):
        found = farms_jax.measure_scale(params, **OF_STACK, **settings)
        assert set(jax.tree.leaves(jax.tree.map(lambda leaf: float(leaf.min()), without_tail))) == {1.0}
        farms_jax.measure_scale(flat, **OF_STACK, **settings)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_step_on_the_cpu_of_a_machine_with_an_accelerator_is_solved_there(monkeypatch):
    params, settings = make_params(), {"solver": "gram64", "tail": farms_jax.Tail("ks")}
    wanted = farms_jax.measure_scale(params, **settings)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = jax.jit(functools.partial(farms_jax.measure_scale, **settings))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("tail", ["median", "ks"])
def test_a_step_lowered_for_another_platform_holds_no_callback(tail):
    params = make_params()
    tx = farms_jax.tempbalance(refresh_every=1, tail=farms_jax.Tail(tail))
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    here, there = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert "callback" in here and "callback" not in there
