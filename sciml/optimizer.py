"""Adam and the schedules of DPOT's fine-tuning, TempBalance last."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

import farms_jax

from .config import Config

Schedule = Callable[[Array | int], Array]
BETAS = (0.9, 0.9)  # DPOT's
CYCLED_BETA = (0.95, 0.85)  # Torch's one-cycle schedule moves Adam's first beta too, from and to these
DIVISOR = 1e4  # a cycle starts at peak / DIVISOR and ends at peak / DIVISOR**2


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """Return DPOT's Adam: clipped gradients, L2 in the gradient, and the layers' factors last.

    The class head does not enter the loss: it is not decayed, as Torch's Adam skips what has no gradient. The state
    shows `learning_rate`, `b1` and `lr_scale`.
    """

    def has_gradient(params: object) -> object:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "cls_head", params)

    rate, beta = schedules(config, steps_per_epoch)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.add_decayed_weights(config.weight_decay, mask=has_gradient),
        optax.inject_hyperparams(optax.adam)(learning_rate=rate, b1=beta, b2=BETAS[1]),
        farms_jax.tempbalance(refresh_every=None),
    )


def schedules(config: Config, steps_per_epoch: int) -> tuple[Schedule, Schedule]:
    """Return learning rate and first beta as functions of the update's number, from 0.

    `cycle` is Torch's OneCycleLR as DPOT calls it: both rise and fall along cosines, the beta the other way round.
    `step` multiplies the rate by `step_gamma` every `step_size` epochs; the beta stays.
    """
    assert config.learning_rate is not None and config.epochs is not None and config.warmup_epochs is not None
    peak, gamma = config.learning_rate, config.step_gamma
    if config.schedule == "step":
        every = config.step_size * steps_per_epoch
        return lambda step: peak * gamma ** (jnp.asarray(step) // every), lambda _: jnp.asarray(BETAS[0])
    steps, rise = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    rate = one_cycle(steps, rise, first=peak / DIVISOR, middle=peak, last=peak / DIVISOR**2)
    highest, lowest = CYCLED_BETA
    return rate, one_cycle(steps, rise, first=highest, middle=lowest, last=highest)


def one_cycle(steps: int, rise: int, first: float, middle: float, last: float) -> Schedule:
    """Return two half cosines: from `first` to `middle` at update `rise - 1`, then to `last` at update `steps - 1`.

    Updates count from 0. A `rise` of 0 starts at the middle; later updates keep the last value.
    """

    def anneal(start: float, end: float, share: Array) -> Array:
        return end + (start - end) / 2 * (1 + jnp.cos(jnp.pi * share))

    def value(step: Array | int) -> Array:
        step = jnp.minimum(step, steps - 1)
        up = step / max(rise - 1, 1)
        down = (step - (rise - 1)) / max(steps - rise, 1)
        return jnp.where(step <= rise - 1, anneal(first, middle, up), anneal(middle, last, down))

    return value
