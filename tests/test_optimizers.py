"""Behind which of optax's optimizers a factor is a learning rate of its own: every one is tried and classified."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import farms_jax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:optax")  # deprecated ones are tried too

RATE = 0.05
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"stack": jax.random.normal(KEYS[0], (2, 4, 4)), "head": jax.random.normal(KEYS[1], (4, 5))}
FACTORS = {"stack": jnp.array([0.5, 1.25]).reshape(2, 1, 1), "head": jnp.array(1.5)}
X = jnp.array([0.4, 0.6, 0.8])


def loss(params, x=X):
    """Cheap to compile, with gradients of each leaf that depend on all."""
    return (x * sum(jnp.log(jnp.cosh(leaf)).sum() for leaf in params.values()) ** 2).mean() / 8


@pytest.fixture(autouse=True)
def operation_by_operation():
    """Each operation is compiled once for all optimizers; whole steps would be for each."""
    with jax.disable_jit(), jax.default_prng_impl("rbg"):
        yield


def balanced(tx):
    return optax.chain(tx, farms_jax.tempbalance(lambda _: FACTORS, refresh_every=1))


def named(name):
    return getattr(contrib, name, None) or getattr(optax, name)


def muon(rate):
    """The stack by Muon, the head by its Adam."""
    # The function is for groups, which have one leaf of the two.
    dims = {"stack": contrib.MuonDimensionNumbers(-2, -1), "head": None}
    return contrib.muon(
        rate,
        weight_decay=0.1,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=lambda params: {name: dims[name] for name in params},
    )


PLAIN = ["adabelief", "adagrad", "adam", "adamax", "amsgrad", "nadam", "optimistic_adam", "optimistic_adam_v2"]
PLAIN += ["optimistic_gradient_descent", "radam", "rprop", "sign_sgd", "signum", "sm3", "yogi", "acprop", "adopt"]
DECAYED = ["adadelta", "adamaxw", "adamw", "adan", "lamb", "lars", "lion", "nadamw", "novograd", "ademamix"]
DECAYED += ["simplified_ademamix"]
# Equal to an optimizer for each layer.
ALONE = {name: lambda rate, name=name: named(name)(rate) for name in PLAIN}
ALONE |= {name: lambda rate, name=name: named(name)(rate, weight_decay=0.1) for name in DECAYED}
ALONE |= {
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2, momentum=0.9),
    "galore": lambda rate: contrib.galore(rate, rank=2),
    "muon": muon,
    "rmsprop": lambda rate: optax.rmsprop(rate, momentum=0.9, centered=True, nesterov=True),
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
}
# Equal to groups of parameters in one optimizer, where they have something in common: a distance, a curvature, noise.
TOGETHER = {
    "dog": lambda rate: contrib.dog(20 * rate, init_step=("heuristic", 0.1)),
    "dowg": lambda rate: contrib.dowg(20 * rate, init_estim_sq_dist=0.01),
    "dpsgd": lambda rate: contrib.dpsgd(rate, 1.0, 0.1, 0),
    "lbfgs(linesearch=None)": lambda rate: optax.lbfgs(rate, memory_size=1, linesearch=None),
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "prodigy": lambda rate: contrib.prodigy(200 * rate, estim_lr0=0.01, weight_decay=0.1),
    "sophia": lambda rate: contrib.sophia(rate, gamma=0.1, clip_threshold=10.0, update_interval=1),
}
# Equal to neither.
UNEQUAL = {
    "cocob": lambda rate: contrib.cocob(20 * rate),
    "dadapt_adamw": lambda rate: contrib.dadapt_adamw(20 * rate, estim_lr0=0.01),
    "fromage": optax.fromage,
    "lbfgs": lambda rate: optax.lbfgs(200 * rate, 1, linesearch=optax.scale_by_backtracking_linesearch(5)),
    "madgrad": contrib.madgrad,
    "momo": lambda rate: contrib.momo(10 * rate),
    "momo_adam": lambda rate: contrib.momo_adam(10 * rate),
    "polyak_sgd": lambda rate: optax.polyak_sgd(10 * rate),
}


def sharpness_aware(tx):
    return contrib.sam(tx, optax.chain(contrib.normalize(), optax.sgd(0.1)))


def momentless(rate):
    return optax.adamw(rate, b1=0.0, weight_decay=0.1)


def factored(rate, **settings):
    return optax.adafactor(rate, min_dim_size_to_factor=2, **settings)


# Equal, with the factors in the place that is given beside the optimizer.
ELSEWHERE = {
    "schedule_free": (
        lambda rate: contrib.schedule_free(momentless(rate), rate),
        lambda: contrib.schedule_free(balanced(momentless(RATE)), RATE),
    ),
    "schedule_free_adamw": (
        lambda rate: contrib.schedule_free_adamw(rate, weight_decay=0.1),
        lambda: contrib.schedule_free(balanced(momentless(RATE)), RATE),
    ),
    "schedule_free_sgd": (
        contrib.schedule_free_sgd,
        lambda: contrib.schedule_free(balanced(optax.sgd(RATE)), RATE),
    ),
    "adafactor(weight_decay_rate)": (
        lambda rate: factored(rate, weight_decay_rate=0.1),
        lambda: optax.chain(balanced(factored(RATE)), optax.add_decayed_weights(-0.1)),
    ),
    "mechanize": (
        lambda rate: contrib.mechanize(optax.sgd(rate), s_init=0.1),
        lambda: contrib.mechanize(balanced(optax.sgd(RATE)), s_init=0.1),
    ),
    "sam": (lambda rate: sharpness_aware(optax.sgd(rate)), lambda: sharpness_aware(balanced(optax.sgd(RATE)))),
}
# Wrappers and parts.
NO_OPTIMIZERS = {
    "differentially_private_aggregate",
    "hutchinson_estimator_diag_hessian",
    "normalize",
    "reduce_on_plateau",
    "schedule_free_eval_params",
    "split_real_and_imaginary",
}


def optimizers_of_optax():
    aliases = vars(sys.modules[optax.adam.__module__])
    found = {name for name in aliases if callable(aliases[name]) and getattr(optax, name, None) is aliases[name]}
    found |= {name for name in vars(contrib) if callable(getattr(contrib, name)) and not name.startswith("scale_by_")}
    return {name for name in found if name[0].islower()} - NO_OPTIMIZERS


def extra_arguments(name, own_loss, value, grads):
    """What some updates ask for beside gradients and parameters."""
    if name == "lbfgs":
        return {"value_fn": own_loss, "value": value, "grad": grads}
    if name in {"momo", "momo_adam", "polyak_sgd"}:
        return {"value": value}
    return {"obj_fn": own_loss} if name == "sophia" else {}


def trained(name, *transforms, steps=3):
    """Parameters after training with (transform, leaves that it sees, `{leaf: index}` of what it moves)."""
    params, states = PARAMS, [tx.init({leaf: PARAMS[leaf] for leaf in sees}) for tx, sees, _ in transforms]
    for _ in range(steps):
        new_params, new_states = params, []
        for (tx, sees, moves), state in zip(transforms, states, strict=True):
            updates, state = update_of(name, tx, {leaf: params[leaf] for leaf in sees}, state, params)
            new_states.append(state)
            new_params = new_params | {
                leaf: new_params[leaf].at[index].add(updates[leaf][index]) for leaf, index in moves.items()
            }
        params, states = new_params, new_states
    return params


def update_of(name, tx, own, state, params):
    def own_loss(own, x=X):
        return loss(params | own, x)

    value, grads = jax.value_and_grad(own_loss)(own)
    extra = extra_arguments(name, own_loss, value, grads)
    if name == "dpsgd":
        grads = jax.vmap(lambda x: jax.grad(own_loss)(own, x[None]))(X)
    return optax.with_extra_args_support(tx).update(grads, state, own, **extra)


def with_factors(name, tx):
    return trained(name, (tx, PARAMS, dict.fromkeys(PARAMS, ...)))


def one_for_each_layer(name, make):
    return trained(name, *((make(RATE * FACTORS[leaf]), [leaf], {leaf: ...}) for leaf in PARAMS))


def one_with_groups(name, make):
    """Every layer by an optimizer of its rate that sees all."""
    layers = [("stack", 0), ("stack", 1), ("head", ...)]
    return trained(
        name, *((make(RATE * FACTORS[leaf][index].squeeze()), PARAMS, {leaf: index}) for leaf, index in layers)
    )


def difference(found, wanted):
    return max(float(jnp.abs(found[leaf] - wanted[leaf]).max() / jnp.abs(wanted[leaf]).max()) for leaf in PARAMS)


EQUAL, UNLIKE = 2e-6, 1e-3  # float32; what a training differs by that is another


def test_every_optimizer_is_classified():
    assert optimizers_of_optax() <= {name.split("(")[0] for name in {*ALONE, *TOGETHER, *UNEQUAL, *ELSEWHERE}}


def test_the_documentation_says_the_same():
    page = (Path(__file__).parent.parent / "docs/tutorials/transformers.md").read_text(encoding="utf-8")
    section = page.split("## Behind which optimizers")[1]
    alone, together, others = re.split(r"\n\n(?=These have|Behind the others)", section)
    of_table = re.findall(r"^\| (`.*?) \|", others, re.MULTILINE)
    for text, names in ((alone, ALONE), (together, TOGETHER), ("".join(of_table), {*UNEQUAL, *ELSEWHERE})):
        assert set(re.findall(r"`([\w(=)]+)`", text)) == set(names)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.slow
def test_behind_it_equals_an_optimizer_for_each_layer(name):
    found = with_factors(name, balanced(ALONE[name](RATE)))
    assert difference(found, one_for_each_layer(name, ALONE[name])) < EQUAL


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.slow
def test_behind_it_equals_groups_in_one_optimizer(name):
    found = with_factors(name, balanced(TOGETHER[name](RATE)))
    assert difference(found, one_with_groups(name, TOGETHER[name])) < EQUAL
    assert difference(found, one_for_each_layer(name, TOGETHER[name])) > UNLIKE


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.slow
def test_behind_it_equals_nothing(name):
    found = with_factors(name, balanced(UNEQUAL[name](RATE)))
    assert difference(found, one_for_each_layer(name, UNEQUAL[name])) > UNLIKE
    assert difference(found, one_with_groups(name, UNEQUAL[name])) > UNLIKE


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_it_is_equal(name):
    make, elsewhere = ELSEWHERE[name]
    wanted = (one_with_groups if name in {"mechanize", "sam"} else one_for_each_layer)(name, make)
    assert difference(with_factors(name, elsewhere()), wanted) < EQUAL
    assert difference(with_factors(name, balanced(make(RATE))), wanted) > UNLIKE
