"""tempbalance(): per-layer learning rates as an optax transform, with the rates as visible state.

The factor multiplies the finished update, so the transform comes last in a chain, after momentum and weight decay, and
commutes with the learning rate: this equals per-group rates in Torch's SGD and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import jax
import optax

from farms_jax._factors import Schedule, TempBalanceState, check_static, init_factors, next_factors, scaled
from farms_jax._measure import Settings, chosen, lists_settings, measure_scale

_NAME = "lr_scale"


@lists_settings
def tempbalance(
    scale_fn: Callable[[Any], Any] | None = None,
    *,
    refresh_every: int | None,
    ramp: int | None = None,
    until: int | None = None,
    **settings: Unpack[Settings],
) -> optax.GradientTransformationExtraArgs:
    r"""Give every layer its own learning rate, by the heavy tail of its spectrum (TempBalance, with FARMS windows).

    Put it last in a chain. The factors are state, found by `optax.tree.get(opt_state, "lr_scale")`. With
    `refresh_every=N` they are measured inside `update`, at updates 0, N, 2N, ...; with `refresh_every=None` they stay
    as they are until `refresh(opt_state, scale)` is called, for instance between epochs. Both train alike; give `stack`
    and `axes` to both, so that the state has the shapes of the factors from the start: the step is then compiled once,
    and a checkpoint is restored into `tx.init(params)`. Under `vmap` over seeds take `None`: there `lax.cond` computes
    both branches, a spectral analysis at every step. In a training step on several devices give their `mesh`: each then
    measures its share of the windows, and holds no more than one layer whole.

    >>> import farms_jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), farms_jax.tempbalance(refresh_every=390, low=0.6, high=1.4))
    >>> opt_state = tx.init({"dense": {"kernel": jnp.ones((8, 8))}})
    >>> float(optax.tree.get(opt_state, "lr_scale")["dense"]["kernel"])
    1.0

    Args:
        scale_fn: params -> tree like params of factors, of shape () or one that broadcasts to its leaf, such as
            (L, 1, 1) for a stack of L layers; takes the place of all settings.
        refresh_every: updates from one measurement to the next, or `None`.
        ramp: updates over which the factors move from the old to the new ones, at most `refresh_every`; `None` for a
            jump.
        until: updates after which nothing is measured any more; `None` for no end.
        **settings: `window`, `tail`, `axes`, `stack`, `exclude`, `kernel_scale`, `solver`, `max_batch_bytes`, `mesh` of
            `analyze`; `low`, `high`, `mapping`, `metric`, `follow`, `range_quantiles`, `fixed` of `lr_scale`. Under
            `optax.inject_hyperparams(tempbalance, static_args="refresh_every")`, `low` and `high` may be
            schedules; name in its `static_args` also what is a function, such as `axes`.

    Returns:
        The transform; its `update` needs `params` where `refresh_every` is a number.

    Raises:
        ValueError: `refresh_every`, `ramp` or `until` out of range; settings that would have no effect, beside a
            `scale_fn` or without `refresh_every`.
        TypeError: an unknown setting; an array in the place of `refresh_every`, `ramp` or `until`.

    References:
        Zhou et al., Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training, NeurIPS 2023.
    """
    schedule = Schedule(refresh_every, ramp, until)
    schedule.check("tempbalance")
    given = chosen("tempbalance", settings)
    effective = () if scale_fn is not None else {"axes", "stack"} if refresh_every is None else given
    if without_effect := given.keys() - effective:
        why = "scale_fn replaces them" if scale_fn is not None else "pass them to lr_scale and analyze before refresh"
        raise ValueError(f"tempbalance: {', '.join(sorted(without_effect))} would have no effect here: {why}")
    measure = scale_fn or (lambda params: measure_scale(params, **given))

    def init(params: optax.Params) -> TempBalanceState:
        shaped = refresh_every is not None or bool(given)
        return init_factors(TempBalanceState, _NAME, params, measure if shaped else None, schedule)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TempBalanceState]:
        del extra_args
        state = next_factors(_NAME, state, params, measure, schedule)
        # Each factor stands for its leaf and for the box that the leaf may be in.
        return jax.tree.map_with_path(scaled, state.hyperparams[_NAME], updates), state

    return optax.GradientTransformationExtraArgs(init, update)


@lists_settings
def llr(
    total_steps: int,
    ends: str | Iterable[str],
    *,
    refresh_every: int = 100,
    ramp: int = 50,
    share: float = 0.2,
    **settings: Unpack[Settings],
) -> optax.GradientTransformationExtraArgs:
    r"""Give every layer of a language model its own rate early in pretraining (LLR), by `tempbalance`.

    Factors are linear in alpha, move to their new values over some updates, and stay as they are after the first part
    of the training. Embeddings and head have the highest. Put it last in a chain. The paper measures whole matrices,
    `window=None`; the default are FARMS's windows.

    >>> import farms_jax, optax
    >>> tx = optax.chain(optax.adamw(1e-3), farms_jax.llr(10_000, [r"embed/.*", r"head/.*"]))

    Args:
        total_steps: updates of the whole training.
        ends: patterns of the names of embeddings and output head, matched whole.
        refresh_every: updates from one measurement to the next.
        ramp: updates over which the factors move to their new values.
        share: part of the training in which the factors are measured, in (0, 1].
        **settings: others of `tempbalance`; `low` and `high` are 1 and 5 by default, `high` also of the ends,
            to which `fixed` adds.

    Returns:
        The transform.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an unknown setting; an array in the place of a number.

    References:
        One LR Doesn't Fit All: Heavy-Tail Guided Layerwise Learning Rates for LLMs, ICML 2026, arXiv 2605.22297.
    """
    check_static("llr", total_steps=total_steps, share=share)
    if not 0 < share <= 1 or total_steps < 1:
        raise ValueError(f"llr: share must be in (0, 1] and total_steps at least 1, got {share} and {total_steps}")
    given = {"low": 1.0, "high": 5.0, **chosen("llr", settings)}
    patterns = (ends,) if isinstance(ends, str) else ends
    given["fixed"] = {**dict.fromkeys(patterns, "high"), **given.get("fixed", {})}
    until = max(1, int(share * total_steps))
    return tempbalance(refresh_every=refresh_every, ramp=ramp, until=until, **given)
