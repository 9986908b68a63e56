"""tempbalance(): per-layer learning rates as an optax transform, with the rates as visible state.

The factor multiplies the finished update, so the transform comes last in a chain, after momentum and weight decay, and
commutes with the learning rate: this equals per-group rates in Torch's SGD and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from farms_jax import mappings
from farms_jax._analyze import analyze
from farms_jax._axes import Axes
from farms_jax._lr_scale import MappingName, lr_scale
from farms_jax._names import Follow, named_leaves
from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.solvers.dispatch import Solver


class TempBalanceState(NamedTuple):
    """State of `tempbalance`: arrays only, so that any checkpointer takes it.

    Attributes:
        count: updates so far, int32, shape ().
        hyperparams: `{"lr_scale": tree}`, one float32 scalar per parameter, 1.0 = untouched. As in
            `optax.inject_hyperparams`: readable and settable between steps, without recompilation.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    hyperparams: dict[str, Any]


class Settings(TypedDict, total=False):
    """Settings that `tempbalance` passes on to `analyze` and `lr_scale`."""

    window: Window | None
    tail: Tail
    axes: Axes
    exclude: str | Iterable[str]
    kernel_scale: float
    solver: Solver
    max_batch_bytes: int
    mesh: Mesh | None
    low: float
    high: float
    mapping: MappingName | mappings.Mapping
    metric: str
    follow: Follow | None


_LR_SCALE_SETTINGS = ("low", "high", "mapping", "metric", "follow")


def measure_scale(params: Any, **settings: Unpack[Settings]) -> Any:
    """Analyse the parameters and map the result to factors: `lr_scale(analyze(params, ...), params, ...)`.

    Args:
        params: the parameters.
        **settings: arguments of `analyze` and of `lr_scale`.

    Returns:
        A tree like `params` of float32 scalars.
    """
    analysis: dict[str, Any] = dict(settings)
    scale = {key: analysis.pop(key) for key in _LR_SCALE_SETTINGS if key in analysis}
    return lr_scale(analyze(params, **analysis), params, **scale)


def tempbalance(
    scale_fn: Callable[[Any], Any] | None = None, *, refresh_every: int | None, **settings: Unpack[Settings]
) -> optax.GradientTransformationExtraArgs:
    r"""Give every layer its own learning rate, by the heavy tail of its spectrum (TempBalance, with FARMS windows).

    Put it last in a chain. The factors are state, found by `optax.tree.get(opt_state, "lr_scale")`. With
    `refresh_every=N` they are measured inside `update`, at updates 0, N, 2N, ...; with `refresh_every=None` they stay
    as they are until `refresh(opt_state, scale)` is called, for instance between epochs. Both train alike. Under `vmap`
    over seeds take `None`: there `lax.cond` computes both branches, a spectral analysis at every step. In a training
    step on several devices give their `mesh`: each then measures its share of the windows, and holds no more than one
    layer whole.

    >>> import farms_jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), farms_jax.tempbalance(refresh_every=390, low=0.6, high=1.4))
    >>> opt_state = tx.init({"dense": {"kernel": jnp.ones((8, 8))}})
    >>> float(optax.tree.get(opt_state, "lr_scale")["dense"]["kernel"])
    1.0

    Args:
        scale_fn: params -> tree like params of scalar factors; takes the place of all settings.
        refresh_every: updates from one measurement to the next, or `None`.
        **settings: `window`, `tail`, `axes`, `exclude`, `kernel_scale`, `solver`, `max_batch_bytes`, `mesh` of
            `analyze`; `low`, `high`, `mapping`, `metric`, `follow` of `lr_scale`.

    Returns:
        The transform; its `update` needs `params` where `refresh_every` is a number.

    Raises:
        ValueError: `refresh_every` below 1; settings that would have no effect, beside a `scale_fn` or without
            `refresh_every`.
        TypeError: an unknown setting.

    References:
        Zhou et al., Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training, NeurIPS 2023.
    """
    if refresh_every is not None and (refresh_every < 1 or refresh_every != int(refresh_every)):
        raise ValueError(f"tempbalance: refresh_every must be None or a whole number from 1 on, got {refresh_every}")
    if unknown := sorted(set(settings) - set(Settings.__annotations__)):
        raise TypeError(f"tempbalance: unknown setting {unknown[0]!r}; known are {', '.join(Settings.__annotations__)}")
    if settings and (scale_fn is not None or refresh_every is None):
        why = "scale_fn replaces them" if scale_fn is not None else "pass them to lr_scale and analyze before refresh"
        raise ValueError(f"tempbalance: {', '.join(sorted(settings))} would have no effect here: {why}")
    measure = scale_fn if scale_fn is not None else lambda params: measure_scale(params, **settings)

    def init(params: optax.Params) -> TempBalanceState:
        ones = jax.tree.map(lambda _: jnp.ones((), jnp.float32), params)
        return TempBalanceState(jnp.zeros((), jnp.int32), {"lr_scale": ones})

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TempBalanceState]:
        del extra_args
        scale = state.hyperparams["lr_scale"]
        if refresh_every is not None:
            if params is None:
                raise ValueError(
                    "tempbalance: with refresh_every, call tx.update(grads, opt_state, params): it measures params"
                )
            due = state.count % refresh_every == 0
            scale = lax.cond(due, lambda old: _like(old, measure(params)), lambda old: old, scale)
        # Factors are float32 and updates may be bfloat16, which they stay.
        updates = jax.tree.map(lambda update, factor: update * jnp.asarray(factor, update.dtype), updates, scale)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, TempBalanceState(count, {**state.hyperparams, "lr_scale": scale})

    return optax.GradientTransformationExtraArgs(init, update)


def _like(old: Any, scale: Any) -> Any:
    """Return factors, float32, in the structure of the old ones.

    They are matched by name: integer keys, as in an NNX state, are ordered otherwise than the same keys as strings.

    Raises:
        ValueError: they have other names, or are not scalars.
    """
    factors, names = dict(named_leaves(scale)), [name for name, _ in named_leaves(old)]
    if len(factors) != len(names):
        raise ValueError(f"scale: {len(factors)} factors for {len(names)} parameters; it must be like params")
    if missing := [name for name in names if name not in factors]:
        raise ValueError(f"scale: no factor for {missing[0]!r}; it must be like params")
    if any(jnp.shape(factor) != () for factor in factors.values()):
        raise ValueError("scale: factors must be scalars, one per parameter")
    return jax.tree.unflatten(jax.tree.structure(old), [jnp.asarray(factors[name], jnp.float32) for name in names])


def refresh(opt_state: Any, scale: Any) -> Any:
    """Write new factors into the `TempBalanceState` of an optimizer state.

    Args:
        opt_state: state of a chain with `tempbalance`, wrapped or not (`MultiSteps`, `nnx.Optimizer`).
        scale: tree like the parameters, as from `lr_scale`.

    Returns:
        The same structure with the new factors.

    Raises:
        ValueError: there is no `TempBalanceState`, more than one, or `scale` does not fit.
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, TempBalanceState)

    nodes, structure = jax.tree.flatten(opt_state, is_leaf=is_ours)
    ours = [i for i, node in enumerate(nodes) if is_ours(node)]
    if len(ours) != 1:
        found = "no TempBalanceState" if not ours else f"{len(ours)} TempBalanceStates"
        remedy = "add farms_jax.tempbalance(...) to the chain" if not ours else "refresh one at a time"
        raise ValueError(f"refresh: {found} in opt_state; {remedy}")
    state = nodes[ours[0]]
    hyperparams = {**state.hyperparams, "lr_scale": _like(state.hyperparams["lr_scale"], scale)}
    nodes[ours[0]] = state._replace(hyperparams=hyperparams)
    return jax.tree.unflatten(structure, nodes)
