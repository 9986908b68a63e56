"""Updates against torch's SGD and AdamW with one parameter group per layer, whose rates change between steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import farms_jax

SHAPES = {
    "conv": {"kernel": (3, 3, 4, 6), "bias": (6,)},
    "norm": {"scale": (6,), "bias": (6,)},
    "dense": {"kernel": (6, 5), "bias": (5,)},
}
BASE_RATES = [0.1, 0.1, 0.08, 0.05, 0.05, 0.02]
FACTORS = [  # before each step; as after a refresh at steps 0, 2 and 5. Exact in float32, which factors are
    *2 * [{"conv": 0.5, "norm": 1.0, "dense": 1.5}],
    *3 * [{"conv": 1.375, "norm": 0.625, "dense": 0.875}],
    {"conv": 0.6875, "norm": 1.25, "dense": 0.5625},
]
RTOL = {"float32": 2e-5, "float64": 1e-12}


def draw(seed, dtype, scale=1.0):
    """A tree of arrays like SHAPES."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def sgd(rate):
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9)
    )


def torch_sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)


def adamw(rate):
    return optax.inject_hyperparams(optax.adamw)(learning_rate=rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)


def torch_adamw(groups):
    return torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def torch_trajectory(make, dtype):
    """Parameters after each step, by layer and leaf."""
    values = draw(0, dtype)
    tensors = {
        layer: {leaf: torch.tensor(x, requires_grad=True) for leaf, x in v.items()} for layer, v in values.items()
    }
    optimizer = make([{"params": list(leaves.values())} for leaves in tensors.values()])
    trajectory = []
    for step, (rate, factors) in enumerate(zip(BASE_RATES, FACTORS, strict=True)):
        grads = draw(step + 1, dtype, 0.5)
        for (layer, leaves), group in zip(tensors.items(), optimizer.param_groups, strict=True):
            group["lr"] = rate * factors[layer]
            for leaf, tensor in leaves.items():
                tensor.grad = torch.tensor(grads[layer][leaf])
        optimizer.step()
        trajectory.append({
            layer: {k: v.detach().numpy().copy() for k, v in leaves.items()} for layer, leaves in tensors.items()
        })
    return trajectory


def our_trajectory(make, dtype, jitted):
    def rate(count):
        return jnp.asarray(BASE_RATES)[count]

    tx = optax.chain(make(rate), farms_jax.tempbalance(refresh_every=None))
    params = jax.tree.map(jnp.asarray, draw(0, dtype))
    opt_state = tx.init(params)
    update = jax.jit(tx.update) if jitted else tx.update
    trajectory = []
    for step, factors in enumerate(FACTORS):
        scale = {layer: dict.fromkeys(leaves, factors[layer]) for layer, leaves in SHAPES.items()}
        opt_state = farms_jax.refresh(opt_state, scale)
        updates, opt_state = update(jax.tree.map(jnp.asarray, draw(step + 1, dtype, 0.5)), opt_state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("ours", "theirs"), [(sgd, torch_sgd), (adamw, torch_adamw)], ids=["sgd", "adamw"])
def test_updates_equal_those_of_parameter_groups(ours, theirs, dtype, jitted):
    with jax.enable_x64(dtype == "float64"):
        found = our_trajectory(ours, dtype, jitted)
    expected = torch_trajectory(theirs, dtype)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, leaf in farms_jax.named_leaves(a):
            layer, _, key = name.partition("/")
            assert leaf.dtype == b[layer][key].dtype == dtype
            np.testing.assert_allclose(
                leaf, b[layer][key], RTOL[dtype], RTOL[dtype], err_msg=f"{name} after step {step}"
            )
