"""Analyses on 8 forced CPU devices, each against one device: prints what `test_sharded.py` asserts, as JSON."""

import functools
import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import farms_jax
from farms_jax import FLAX_AXES, Tail, Window
from farms_jax._report import METRICS
from farms_jax._windows import make_grid
from farms_jax.solvers import cpu, mesh as mesh_solver
from farms_jax.solvers.dispatch import Cut, Options

MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "rows": (normal(64, 48), P("x")),
    "cols": (normal(64, 48).astype(jnp.bfloat16), P(None, "x")),
    "both": (normal(64, 48), P("x", "y")),
    "both again": (normal(64, 48), P("x", "y")),
    "stacked": (normal(2, 64, 48), P(None, "x", "y")),
    "turned": (normal(32, 96), P(None, ("y", "x"))),
    "replicated": (normal(64, 48), P()),
    "kernel": (normal(3, 3, 16, 32), P(None, None, "y", "x")),
    "positions": (normal(2, 3, 24, 8), P("y", None, "x")),
    "complex": ((normal(40, 24) + 1j * normal(40, 24)).astype(np.complex64), P("y", "x")),
    "far spike": (normal(64, 48) + 300 * np.outer(normal(64), normal(48)), P("x", "y")),
}
HOST = {name: weight for name, (weight, _) in WEIGHTS.items()}


def place(names=tuple(WEIGHTS), mesh=MESH):
    return {name: jax.device_put(HOST[name], NamedSharding(mesh, WEIGHTS[name][1])) for name in names}


def difference(found, expected):
    """Largest relative difference of any measure of any layer."""
    assert (found.names, found.left_out, found.num_params) == (expected.names, expected.left_out, expected.num_params)
    pairs = [[np.asarray(getattr(report, metric), float) for report in (found, expected)] for metric in METRICS]
    assert all(np.isfinite(ours).all() for ours, _ in pairs)
    return max(float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-30)).max()) for ours, theirs in pairs)


def against_one_device(names=tuple(WEIGHTS), **settings):
    settings |= {"stack": {"stacked": 0}} if "stacked" in names else {}
    expected = farms_jax.analyze({name: HOST[name] for name in names}, **settings)
    return difference(farms_jax.analyze(place(names), **settings), expected)


def same_result(results):
    overlapping = Window(rows=40, per_axis=5)  # windows share Gram matrices
    results["median"] = against_one_device(window=overlapping)
    results["little memory"] = against_one_device(("both",), window=overlapping, max_batch_bytes=1)
    results["ks, pooled"] = against_one_device(
        ("both", "kernel"), tail=Tail(xmin="ks"), window=Window(divisions="pooled")
    )
    results["svd"] = against_one_device(("turned",), solver="svd", window=Window(aspect_ratio=2.0, per_axis=2))
    results["gram64, whole"] = against_one_device(("turned",), solver="gram64", window=None)


def accelerator(results):
    """The solvers of accelerators, one window at a time: on CPU batches may wait forever, see `solvers.cpu`."""
    weights = list(place(("turned",)).values())
    grids = [make_grid(Window(rows=24, aspect_ratio=0.5, per_axis=2), (1, 96, 32), is_kernel=False)]
    cuts = [Cut(FLAX_AXES.of(2), grid) for grid in grids]
    (spectra,) = mesh_solver.pooled_eigenvalues(weights, cuts, MESH, Options("gpu", "svd", False, 1))
    (found,) = spectra.values
    (expected,) = cpu.spectra([HOST["turned"].T[None]], grids, solver="svd", max_bytes=2**30)
    results["accelerator"] = float(np.abs(found - expected).max() / expected.max())


def ways_in(results):
    host = {name: HOST[name] for name in ("rows", "both")}
    expected = farms_jax.analyze(host, eigenvalues=True)
    found = farms_jax.analyze(host, eigenvalues=True, mesh=MESH)
    results["host arrays"] = difference(found, expected)
    results["eigenvalues"] = max(
        float(np.abs(ours - theirs).max() / theirs.max())
        for ours, theirs in zip(found.eigenvalues, expected.eigenvalues, strict=True)
    )
    results["on all devices"] = found.alpha.sharding.is_fully_replicated and len(found.alpha.devices()) == 8
    one = jax.tree.map(lambda weight: jax.device_put(weight, jax.devices()[5]), host)
    results["arrays of one device"] = difference(farms_jax.analyze(one, eigenvalues=True, mesh=MESH), expected)
    other = Mesh(MESH.devices.reshape(2, 4)[::-1], ("a", "b"))  # the same devices in another order
    both = {**place(("both",)), "rows": jax.device_put(HOST["rows"], NamedSharding(other, P("a")))}
    results["two meshes"] = difference(farms_jax.analyze(both, eigenvalues=True), expected)
    with jax.enable_x64(True):
        double = {"rows": RNG.standard_normal((40, 24))}
        results["x64"] = difference(farms_jax.analyze(double, mesh=MESH), farms_jax.analyze(double))


def traced(results):
    settings = {"window": Window(rows=12, per_axis=2)}
    weights = [normal(96, 64) for _ in range(6)]
    expected = farms_jax.analyze(weights, **settings)
    run = jax.jit(lambda weights: farms_jax.analyze(weights, mesh=MESH, **settings))
    results["layer"], results["temporary"], results["traced"] = weights[0].nbytes, 0, 0
    for spec in (P("y", "x"), P(None, ("y", "x"))):
        placed = jax.device_put(weights, NamedSharding(MESH, spec))
        program = run.lower(placed).compile()
        results["temporary"] = max(results["temporary"], program.memory_analysis().temp_size_in_bytes)
        results["traced"] = max(results["traced"], difference(program(placed), expected))
    weight, expected = weights[0], farms_jax.analyze({"w": weights[0]}, **settings)
    program = jax.jit(lambda w: farms_jax.analyze({"w": w}, mesh=MESH, **settings))
    broken = weight.copy()
    broken[70, 3] = np.nan
    placed = jax.device_put(broken, NamedSharding(MESH, P()))
    results["alpha of NaN"] = float(program(placed).alpha[0])
    for _ in range(20):  # any of them might stand still
        program(placed).alpha.block_until_ready()
    unsharded = jax.jit(lambda w: farms_jax.analyze({"w": w}, **settings))
    results["traced without a mesh"] = difference(
        unsharded(jax.device_put(weight, NamedSharding(MESH, P("x")))), expected
    )
    with jax.set_mesh(EXPLICIT):
        placed = jax.device_put(weight, NamedSharding(EXPLICIT, P("y", "x")))
        found = jax.jit(lambda w: farms_jax.analyze({"w": w}, mesh=EXPLICIT, **settings))(placed)
        results["explicit axes"] = difference(found, expected)
        found = jax.jit(lambda w: farms_jax.analyze({"w": w}, **settings))(placed)
        results["explicit axes without a mesh"] = difference(found, expected)


def experts(results):
    """A stack of layers of experts, whichever axes are sharded: no device holds more of it than one layer whole."""
    settings = {"window": Window(rows=12, per_axis=2), "stack": (0, 2)}
    weights = [normal(2, 96, 8, 64) for _ in range(2)]
    expected = farms_jax.analyze(weights, **settings)
    results["experts"], results["temporary of experts"] = 0, 0
    for mesh, spec in ((MESH, P(None, None, ("x", "y"))), (MESH, P("y", "x")), (EXPLICIT, P("y", None, "x"))):
        placed = jax.device_put(weights, NamedSharding(mesh, spec))
        program = jax.jit(functools.partial(farms_jax.analyze, mesh=mesh, **settings)).lower(placed).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        results["temporary of experts"] = max(results["temporary of experts"], memory)
        for found in (program(placed), farms_jax.analyze(placed, **settings)):
            results["experts"] = max(results["experts"], difference(found, expected))


def train(mesh):
    """Parameters and factors after three steps in float64, and how often the step was compiled."""
    settings = {"low": 0.5, "high": 1.5, "stack": {"blocks": 0}}
    tx = optax.chain(optax.sgd(0.5, momentum=0.9), farms_jax.tempbalance(refresh_every=2, mesh=mesh, **settings))
    rng = np.random.default_rng(1)
    params = {
        "a": {"kernel": jnp.asarray(0.1 * rng.standard_normal((16, 64))), "bias": jnp.zeros(64)},
        "b": {"kernel": jnp.asarray(0.1 * rng.standard_normal((64, 16)))},
        "blocks": jnp.asarray(0.1 * rng.standard_normal((4, 16, 16)) * rng.pareto(3, (4, 1, 1))),
    }
    x = jnp.asarray(rng.standard_normal((32, 16)))
    state = tx.init(params)
    shardings = None
    if mesh is not None:
        by_axes = {0: P(), 1: P("y"), 2: P("x", "y"), 3: P("x")}
        shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, by_axes[leaf.ndim]), (params, state))
        params, state = jax.device_put((params, state), shardings)
        x = jax.device_put(x, NamedSharding(mesh, P("x")))

    def loss(params):
        hidden = x
        for block in params["blocks"]:
            hidden += jnp.tanh(hidden @ block)
        hidden = jnp.tanh(hidden @ params["a"]["kernel"] + params["a"]["bias"])
        return ((hidden @ params["b"]["kernel"] - x) ** 2).mean()

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=shardings)
    for _ in range(3):
        params, state = step(params, state)
    scale = optax.tree.get(state, "lr_scale")
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, scale))], step._cache_size()


def training(results):
    with jax.enable_x64(True):  # float32's rounding would grow from step to step
        (expected, _), (found, compiled) = train(None), train(MESH)
    results["training"] = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    results["scales differ"] = [float(np.ptp(leaf)) for leaf in found if leaf.shape == (4, 1, 1)]
    results["step compiled"] = compiled


def stacked_params():
    weights = {"blocks": {"kernel": normal(3, 32, 64), "bias": normal(3, 64)}, "head": {"kernel": normal(64, 32)}}
    return weights, farms_jax.measure_scale(weights, stack={"blocks/.*": 0})


def refreshed(results):
    """A compiled step of a sharded state takes factors wherever they were measured, in one compilation."""
    weights, scale = stacked_params()
    specs = {"blocks": {"kernel": P(None, "x", "y"), "bias": P(None, "y")}, "head": {"kernel": P("y", "x")}}
    shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
    params = jax.device_put(weights, shardings)
    tx = farms_jax.tempbalance(refresh_every=None)
    state = jax.device_put(farms_jax.refresh(tx.init(params), scale), NamedSharding(MESH, P()))
    step = jax.jit(lambda grads, state: tx.update(grads, state), donate_argnums=1)
    compiled = step.lower(params, state).compile()
    on_one = jax.device_put(weights, jax.devices()[3])
    updates = None
    for measured in (weights, on_one):
        new = farms_jax.measure_scale(measured, stack={"blocks/.*": 0})
        state = farms_jax.refresh(state, jax.tree.map(lambda factor: 2 * factor, new))
        results["state on all devices"] = all(
            leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(state)
        )
        updates, state = compiled(params, state)
    wanted = jax.tree.map(lambda weight, factor: 2 * weight * factor, weights, scale)
    results["refreshed"] = largest_difference(updates, wanted)


def replicated(results):
    """The state of a `pmap` is refreshed by the factors of one replica."""
    weights, scale = stacked_params()
    tx = farms_jax.tempbalance(refresh_every=None)
    params, state = flax.jax_utils.replicate((weights, tx.init(weights)))
    step = jax.pmap(lambda grads, state: tx.update(grads, state), donate_argnums=1)
    for _ in range(2):
        measured = farms_jax.measure_scale(flax.jax_utils.unreplicate(params), stack={"blocks/.*": 0})
        updates, state = step(params, farms_jax.refresh(state, measured))
        wanted = jax.tree.map(lambda weight, factor: np.stack([weight * factor] * 8), weights, scale)
        results["replicated"] = largest_difference(updates, wanted)


def largest_difference(found, wanted):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), found, wanted)))


def lowered(results):
    """A step over a mesh of CPU devices may be lowered for another platform."""
    tx, weights = farms_jax.tempbalance(refresh_every=1, mesh=MESH), {"w": normal(64, 48)}
    traced = jax.jit(tx.update).trace(weights, tx.init(weights), weights)
    for platform in ("cpu", "cuda", "tpu"):
        results[f"callback on {platform}"] = "callback" in traced.lower(lowering_platforms=(platform,)).as_text()


def momentum(results):
    """HTMuon of a stack, whichever axes are sharded, where XLA is free to choose and where it is not."""
    tx = farms_jax.scale_by_htmuon(stack=1)
    gradients = normal(32, 4, 16)
    expected, _ = tx.update(gradients, tx.init(gradients))
    results["htmuon"] = 0
    for mesh, spec in ((MESH, P(None, "x")), (MESH, P("x", None, "y")), (EXPLICIT, P("y", "x"))):
        with jax.set_mesh(mesh):
            placed = jax.device_put(gradients, NamedSharding(mesh, spec))
            for update in (tx.update, jax.jit(tx.update)):
                found, _ = update(placed, tx.init(placed))
                results["htmuon"] = max(results["htmuon"], float(np.abs(found - expected).max()))


def faults(results):
    names = ("both", "replicated")
    halves = [Mesh(MESH.devices[part], ("x", "y")) for part in (slice(2), slice(2, 4))]
    apart = {f"w{i}": jax.device_put(HOST["both"], NamedSharding(half, P("x"))) for i, half in enumerate(halves)}
    broken = {name: weight.at[3, 3].set(jnp.inf) for name, weight in place(names).items()}
    for name, params, mesh in (
        ("apart", apart, None),
        ("another mesh", apart, MESH),
        ("not finite", broken | place(("rows",)), None),
    ):
        try:
            farms_jax.analyze(params, mesh=mesh)
        except ValueError as error:
            results[name] = f"{type(error).__name__}: {error}"

    def fail(*_, **__):
        raise MemoryError("of this test")

    weights = place(names)
    solve, cpu.solve = cpu.solve, fail
    try:
        jax.block_until_ready(jax.jit(lambda weights: farms_jax.analyze(weights, mesh=MESH))(weights))
    except Exception as error:
        results["failing solver"] = str(error)
    cpu.solve = solve
    jax.block_until_ready(farms_jax.analyze(weights))
    before = mesh_solver._solve._cache_size()
    for _ in range(20):
        jax.block_until_ready(farms_jax.analyze(weights))
    results["compiled again"] = mesh_solver._solve._cache_size() - before


if __name__ == "__main__":
    results = {}
    for part in (
        same_result,
        accelerator,
        ways_in,
        traced,
        experts,
        training,
        momentum,
        refreshed,
        replicated,
        lowered,
        faults,
    ):
        part(results)
    sys.stdout.write(json.dumps(results))
