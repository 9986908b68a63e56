"""LLR, AlphaDecay and HTMuon, each against a plain NumPy reading of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import farms_jax
from farms_jax.errors import InputError

RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": RNG.standard_normal((64, 32)).astype("f")},
    "up": {"kernel": RNG.standard_normal((32, 48)).astype("f"), "bias": np.ones(48, "f")},
    "down": {"kernel": (RNG.standard_normal((48, 32)) * RNG.pareto(2, (48, 32))).astype("f")},
    "head": {"kernel": RNG.standard_normal((32, 64)).astype("f")},
}
GRADS = jax.tree.map(lambda leaf: np.full_like(leaf, 0.5), PARAMS)


def hill_alpha(weight):
    """The papers' alpha: Hill's estimate from the median eigenvalue of the whole matrix on."""
    eigenvalues = np.sort(np.linalg.svd(np.asarray(weight, np.float64), compute_uv=False) ** 2)
    start = len(eigenvalues) // 2
    logs = np.log(eigenvalues[start:])
    return 1 + len(logs) / (logs - logs[0]).sum()


def linear(alphas, low, high):
    return np.interp(alphas, [min(alphas), max(alphas)], [low, high])


def moved(params, step):
    """Parameters that differ from measurement to measurement."""
    noise = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: leaf + noise.pareto(2, leaf.shape).astype("f"), params)


def test_llr_measures_ramps_and_freezes():
    every, ramp, total = 4, 2, 40
    tx = farms_jax.llr(total, [r"embed/.*", r"head/.*"], refresh_every=every, ramp=ramp, window=None)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    old = target = now = np.array([1.0, 1.0])  # of up and down
    for step in range(14):
        params = moved(PARAMS, step)
        if step % every == 0 and step < 0.2 * total:
            old, target = now, linear([hill_alpha(params[name]["kernel"]) for name in ("up", "down")], 1, 5)
        now = old + (target - old) * min((step % every + 1 if step < 8 else every) / ramp, 1)
        updates, state = update(GRADS, state, params)
        factors = optax.tree.get(state, "lr_scale")
        np.testing.assert_allclose([factors[name]["kernel"] for name in ("up", "down")], now, rtol=1e-5)
        np.testing.assert_allclose(updates["up"]["bias"], 0.5 * now[0], rtol=1e-5)
    assert factors["embed"]["embedding"] == factors["head"]["kernel"] == 5


def test_alphadecay_scales_the_decay_and_nothing_else():
    tx = farms_jax.alphadecay(0.1, refresh_every=2, window=None)
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    names = ("embed/embedding", "up/kernel", "down/kernel", "head/kernel")
    weights = dict(farms_jax.named_leaves(PARAMS))
    factors = dict(zip(names, linear([hill_alpha(weights[name]) for name in names], 0.5, 1.5), strict=True))
    factors["up/bias"] = factors["up/kernel"]
    for name, found in farms_jax.named_leaves(updates):
        np.testing.assert_allclose(found, 0.5 + 0.1 * factors[name] * weights[name], rtol=1e-5, err_msg=name)


def test_llr_takes_settings_of_tempbalance_and_schedules():
    numbers = ("total_steps", "refresh_every", "ramp", "share")
    tx = optax.inject_hyperparams(farms_jax.llr, static_args=numbers)(
        20, [r"embed/.*", r"head/.*"], refresh_every=1, ramp=1, window=None, high=optax.linear_schedule(4.0, 6.0, 2)
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for high in (4, 5, 6):
        _, state = update(GRADS, state, PARAMS)
        factors = optax.tree.get(state.inner_state, "lr_scale")
        found = [factors[name]["kernel"] for name in ("up", "down")]
        np.testing.assert_allclose(sorted(found), [1, high], rtol=1e-6)
        assert factors["head"]["kernel"] == high
    tx = farms_jax.llr(20, r"head/.*", fixed={r"embed/.*": 2.0}, window=None)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    target = state.ramp["target"]
    assert (target["head"]["kernel"], target["embed"]["embedding"]) == (5, 2)
    with pytest.raises(TypeError, match="llr: total_steps must be a number of Python.*static_args"):
        optax.inject_hyperparams(farms_jax.llr)(20, r"head/.*").init(PARAMS)


@pytest.mark.parametrize("injected", [False, True])
def test_alphadecay_follows_a_schedule_and_a_mask(injected):
    amount = optax.linear_schedule(0.1, 0.2, 2)
    make = optax.inject_hyperparams(farms_jax.alphadecay, static_args="refresh_every") if injected else None
    decay = (make or farms_jax.alphadecay)(amount, refresh_every=1, window=None)
    tx = optax.masked(decay, jax.tree.map(lambda leaf: leaf.ndim > 1, PARAMS))
    factors = farms_jax.measure_scale(PARAMS, window=None)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for now in (0.1, 0.15, 0.2):
        updates, state = update(GRADS, state, PARAMS)
        np.testing.assert_array_equal(updates["up"]["bias"], GRADS["up"]["bias"])
        for name in ("up", "down"):
            wanted = 0.5 + now * factors[name]["kernel"] * PARAMS[name]["kernel"]
            np.testing.assert_allclose(updates[name]["kernel"], wanted, rtol=1e-5, atol=1e-6)


def test_alphadecay_beside_tempbalance_scales_both():
    decay, rates = farms_jax.alphadecay(0.1, refresh_every=1), farms_jax.tempbalance(refresh_every=1)
    both = optax.chain(decay, rates)
    state = both.init(PARAMS)
    updates, state = both.update(GRADS, state, PARAMS)
    alone, _ = decay.update(GRADS, decay.init(PARAMS), PARAMS)
    factors = optax.tree.get(state, "lr_scale")
    for (name, found), (_, decayed), (_, factor) in zip(
        *(farms_jax.named_leaves(tree) for tree in (updates, alone, factors)), strict=True
    ):
        np.testing.assert_allclose(found, decayed * factor, rtol=1e-6, err_msg=name)
    refreshed = farms_jax.refresh(state, jax.tree.map(lambda _: 2.0, PARAMS))
    assert optax.tree.get(refreshed, "decay_scale") == optax.tree.get(state, "decay_scale")


def numpy_htmuon(gradients, beta, power, nesterov):
    """Updates of a sequence of gradients of one matrix (inputs, outputs)."""
    momentum, found = 0, []
    for gradient in gradients:
        momentum = beta * momentum + (1 - beta) * gradient
        ahead = (1 - beta) * gradient + beta * momentum if nesterov else momentum
        left, values, right = np.linalg.svd(ahead.T.astype(np.float64), full_matrices=False)
        rows, cols = ahead.T.shape
        found.append(((left * values**power) @ right).T * max(1, rows / cols) ** 0.5)
    return found


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
@pytest.mark.parametrize(("power", "nesterov"), [(0.125, True), (0.0, False), (1.0, True)])
def test_htmuon_equals_its_paper(shape, power, nesterov):
    gradients = [RNG.standard_normal(shape).astype("f") for _ in range(3)]
    tx = farms_jax.scale_by_htmuon(power=power, nesterov=nesterov)
    state = tx.init({"kernel": gradients[0]})
    for gradient, wanted in zip(gradients, numpy_htmuon(gradients, 0.95, power, nesterov), strict=True):
        updates, state = jax.jit(tx.update)({"kernel": gradient}, state)
        np.testing.assert_allclose(updates["kernel"], wanted, atol=2e-5)


def test_htmuon_takes_the_layers_of_a_stack_one_by_one():
    stacked = RNG.standard_normal((3, 16, 4, 8)).astype("f")
    tx = farms_jax.scale_by_htmuon(axes={"query": "IOO"}, stack={"query": 0})
    updates, _ = tx.update({"query": stacked}, tx.init({"query": stacked}))
    plain = farms_jax.scale_by_htmuon()
    for layer, found in zip(stacked, updates["query"], strict=True):
        matrix = {"kernel": layer.reshape(16, 32)}
        wanted, _ = plain.update(matrix, plain.init(matrix))
        np.testing.assert_allclose(found.reshape(16, 32), wanted["kernel"], atol=1e-5)


def test_htmuon_takes_rounding_for_no_singular_value():
    """Tokens fewer than inputs give gradients of low rank, an expert without tokens gives zeros."""
    rank_2 = (RNG.standard_normal((32, 2)) @ RNG.standard_normal((2, 48))).astype("f")
    left, values, right = np.linalg.svd(rank_2.astype(np.float64), full_matrices=False)
    gradients = {"experts": np.stack([rank_2, np.zeros_like(rank_2)])}
    for power in (0.0, 0.125):
        tx = farms_jax.scale_by_htmuon(beta=0.0, power=power, stack=0)
        for update in (tx.update, jax.jit(tx.update)):
            found, _ = update(gradients, tx.init(gradients))
            wanted = (left[:, :2] * values[:2] ** power) @ right[:2] * (48 / 32) ** 0.5
            np.testing.assert_allclose(found["experts"][0], wanted, atol=2e-5)
            assert not found["experts"][1].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_htmuon_keeps_the_dtype(dtype):
    gradient = RNG.standard_normal((16, 24)) + 1j * RNG.standard_normal((16, 24)) * (dtype == "complex64")
    gradient = jnp.asarray(gradient if dtype == "complex64" else gradient.real, dtype)
    tx = farms_jax.scale_by_htmuon(beta=0.0)
    updates, state = jax.jit(tx.update)({"kernel": gradient}, tx.init({"kernel": gradient}))
    assert updates["kernel"].dtype == state.momentum["kernel"].dtype == dtype
    left, values, right = np.linalg.svd(np.asarray(gradient, complex), full_matrices=False)
    wanted = (left * values**0.125) @ right * (24 / 16) ** 0.5
    np.testing.assert_allclose(
        np.asarray(updates["kernel"], complex), wanted, atol=1e-2 if dtype == "bfloat16" else 2e-5
    )


def test_htmuon_names_what_is_no_matrix():
    with pytest.raises(InputError, match=r"up/bias is no matrix.*optax.partition"):
        farms_jax.scale_by_htmuon().init(PARAMS)
