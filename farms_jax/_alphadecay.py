"""alphadecay(): weight decay by module, as an optax transform."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from farms_jax._factors import FactorState, Schedule, init_factors, next_factors, scaled
from farms_jax._measure import Settings, chosen, lists_settings, measure_scale

_NAME = "decay_scale"


class AlphaDecayState(FactorState):
    """State of `alphadecay`: its factors are `hyperparams["decay_scale"]`."""

    __slots__ = ()


@lists_settings
def alphadecay(
    weight_decay: Any, *, refresh_every: int, **settings: Unpack[Settings]
) -> optax.GradientTransformationExtraArgs:
    r"""Decay the weights of every layer by a factor of its own, linear in alpha (AlphaDecay).

    The better trained a layer, the less it is decayed. It stands where `optax.add_decayed_weights` would, before the
    learning rate, and is a transform of its own beside `tempbalance`, whose factors scale the decay with the rest of an
    update. The paper measures whole matrices, `window=None`; the default are FARMS's windows. Leaves that are no
    layers, and follow none, are decayed as they are: `optax.masked` leaves some of them out.

    >>> import farms_jax, optax
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(), farms_jax.alphadecay(0.1, refresh_every=500), optax.scale_by_learning_rate(1e-3)
    ... )

    Args:
        weight_decay: the decay that is scaled, or a schedule of it.
        refresh_every: updates from one measurement to the next.
        **settings: of `analyze` and `lr_scale`, as `tempbalance` takes them. `low` and `high`, factors of the smallest
            and the largest alpha, are 0.5 and 1.5 by default, as in the paper.

    Returns:
        The transform; its `update` needs `params`, its factors are found by `optax.tree.get(state, "decay_scale")`.

    Raises:
        ValueError: `refresh_every` below 1.
        TypeError: an unknown setting.

    References:
        He et al., AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in LLMs, arXiv 2506.14562.
    """
    schedule = Schedule(refresh_every)
    schedule.check("alphadecay")
    given = chosen("alphadecay", settings)

    def measure(params: Any) -> Any:
        return measure_scale(params, **given)

    def init(params: optax.Params) -> AlphaDecayState:
        return init_factors(AlphaDecayState, _NAME, params, measure, schedule)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AlphaDecayState]:
        del extra_args
        now = weight_decay(state.count) if callable(weight_decay) else weight_decay
        state = next_factors(_NAME, state, params, measure, schedule)
        decay = jax.tree.map_with_path(scaled, state.hyperparams[_NAME], params)

        def decayed(update: Any, amount: Any) -> Any:
            return update + jnp.asarray(now, update.dtype) * amount.astype(update.dtype)

        return jax.tree.map(decayed, updates, decay), state

    return optax.GradientTransformationExtraArgs(init, update)
