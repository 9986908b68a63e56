"""Factors of the leaves as optimizer state: measured every N updates inside a step, or written between steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from farms_jax._names import name_of, named_leaves, without_boxes
from farms_jax.errors import LeftOutWarning

_RATES = "lr_scale"


class FactorState(NamedTuple):
    """State of a transform by factors: arrays only, so that any checkpointer takes it.

    Attributes:
        count: updates so far, int32, shape ().
        hyperparams: `{name: tree}`, a float32 factor for every parameter, 1.0 = untouched: of shape (), or
            (L, 1, ...) for a stack of L layers. As in `optax.inject_hyperparams`: readable, and settable between steps
            where nothing moves them inside, without recompilation.
        ramp: `{"start": tree, "target": tree}`, the factors between which a ramp moves; empty without one.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    hyperparams: dict[str, Any]
    ramp: dict[str, Any]


class TempBalanceState(FactorState):
    """State of `tempbalance`: its factors are `hyperparams["lr_scale"]`."""

    __slots__ = ()


State = TypeVar("State", bound=FactorState)


class Schedule(NamedTuple):
    """When factors are measured.

    Attributes:
        every: updates from one measurement to the next; `None` for none inside a step.
        ramp: updates over which the factors move, linearly, from the old to the new ones; `None` for a jump.
        until: updates after which there is no measurement any more; `None` for no end.
    """

    every: int | None
    ramp: int | None = None
    until: int | None = None

    def check(self, caller: str) -> None:
        """Check the numbers.

        Raises:
            TypeError: one is an array.
            ValueError: one is out of its range, or has no effect.
        """
        check_static(caller, refresh_every=self.every, ramp=self.ramp, until=self.until)
        for name, value, least in (("refresh_every", self.every, 1), ("ramp", self.ramp, 1), ("until", self.until, 1)):
            if value is not None and (value < least or value != int(value)):
                raise ValueError(f"{caller}: {name} must be a whole number from {least} on, got {value}")
        if self.every is None and (self.ramp is not None or self.until is not None):
            raise ValueError(f"{caller}: ramp and until have no effect without refresh_every")
        if self.every is not None and self.ramp is not None and self.ramp > self.every:
            raise ValueError(f"{caller}: ramp must be at most refresh_every, {self.every}, got {self.ramp}")


def check_static(caller: str, **numbers: Any) -> None:
    """Check that numbers are Python's, so that they are the same in every step.

    Raises:
        TypeError: one is an array.
    """
    for name, value in numbers.items():
        if isinstance(value, Array):
            raise TypeError(
                f"{caller}: {name} must be a number of Python, not an array; under optax.inject_hyperparams name it in "
                "static_args"
            )


def init_factors(
    kind: type[State], name: str, params: Any, measure: Callable[[Any], Any] | None, schedule: Schedule
) -> State:
    """Return a state of ones under hyperparameter `name`, in the shapes that measurements will have; `None` for ()."""
    # Without boxes: the sharding of a weight, which they name, is none for its factor.
    scale = jax.tree.map(lambda _: jnp.ones((), jnp.float32), without_boxes(params))
    # `optax.tree.map_params` asks for the state of a tree without leaves, in which no pattern finds its own.
    if measure is not None and jax.tree.leaves(params):
        shapes = {leaf: factor.shape for leaf, factor in named_leaves(jax.eval_shape(measure, params))}
        scale = jax.tree.map_with_path(lambda path, _: jnp.ones(shapes.get(name_of(path), ()), jnp.float32), scale)
    ramp = {key: jax.tree.map(jnp.copy, scale) for key in ("start", "target")} if schedule.ramp is not None else {}
    return kind(jnp.zeros((), jnp.int32), {name: scale}, ramp)


def next_factors(name: str, state: State, params: Any, measure: Callable[[Any], Any], schedule: Schedule) -> State:
    """Return the state one update later; its factors are those of this update, measured if they are due."""
    scale, ramp, count = state.hyperparams[name], state.ramp, state.count
    if schedule.every is not None:
        if params is None:
            raise ValueError(
                f"{name}: with refresh_every, call tx.update(grads, opt_state, params): it measures params"
            )
        fixed = lax.stop_gradient(params)  # the factors are constants of a step, also to who differentiates it
        due = count % schedule.every == 0
        last = count
        if schedule.until is not None:
            due &= count < schedule.until
            last = jnp.minimum(count, schedule.until - 1)
        if schedule.ramp is not None:
            start = jax.tree.map(lambda now, before: jnp.where(due, now, before), scale, ramp["start"])
            target = _measured(due, ramp["target"], fixed, measure)
            since = count - last // schedule.every * schedule.every
            share = jnp.minimum((since + 1) / schedule.ramp, 1.0)
            scale = jax.tree.map(lambda a, b: (a + (b - a) * share).astype(jnp.float32), start, target)
            ramp = {"start": start, "target": target}
        else:
            scale = _measured(due, scale, fixed, measure)
    hyperparams = {**state.hyperparams, name: scale}
    return state._replace(count=jnp.asarray(optax.safe_increment(count)), hyperparams=hyperparams, ramp=ramp)


def _measured(due: Array, old: Any, params: Any, measure: Callable[[Any], Any]) -> Any:
    def new(before: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LeftOutWarning)  # `init` has warned, once
            return like(before, measure(params))

    return lax.cond(due, new, lambda before: before, old)


def scaled(path: tuple[Any, ...], factor: Any, update: Any) -> Any:
    """Return the update of a leaf times its factor."""

    def times(leaf: Array) -> Array:
        if not _broadcasts(jnp.shape(factor), jnp.shape(leaf)):
            raise ValueError(
                f"scale: the factor of {name_of(path)} has shape {jnp.shape(factor)}, "
                f"which does not broadcast to {jnp.shape(leaf)}"
            )
        return leaf * jnp.asarray(factor, leaf.dtype)  # float32, and updates may be bfloat16, which they stay

    return jax.tree.map(times, update)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(own in {1, size} for own, size in sizes)


def like(old: Any, scale: Any, copies: tuple[int, ...] = ()) -> Any:
    """Return factors, float32, in the structure of the old ones, each in a buffer of its own, on the old one's devices.

    They are matched by name: integer keys, as in an NNX state, are ordered otherwise than the same keys as strings. A
    transform of some parameters takes theirs from the factors of all.

    Args:
        old: the old factors.
        scale: the new ones.
        copies: leading axes of a state that is replicated or has one training for each seed. Factors without them are
            the same for all copies.

    Raises:
        ValueError: one is missing.
    """
    factors = dict(named_leaves(scale))
    missing = () if all(jnp.shape(factor)[: len(copies)] == copies for factor in factors.values()) else copies

    def new(path: tuple[Any, ...], before: Array) -> Array:
        name = name_of(path)
        if name not in factors:
            raise ValueError(f"scale: no factor for {name!r}; it must be like params")
        own, had = (*missing, *jnp.shape(factors[name]))[len(copies) :], jnp.shape(before)[len(copies) :]
        factor = jnp.broadcast_to(factors[name], (*copies, *own))
        if _broadcasts(own, had):  # the shape stays, for which the step is compiled
            ones = (1,) * (len(had) - len(own))
            factor = jnp.broadcast_to(factor.reshape(*copies, *ones, *own), (*copies, *had))
        return _placed_as(before, jnp.array(factor, jnp.float32, copy=True))

    return jax.tree.map_with_path(new, old)


def _placed_as(before: Any, factor: Array) -> Array:
    """Return a factor on the devices of the old one, for which the step is compiled, wherever it was measured."""
    if isinstance(before, Tracer) or isinstance(factor, Tracer) or not isinstance(before, jax.Array):
        return factor
    fits = before.shape == factor.shape or before.is_fully_replicated
    if isinstance(before.sharding, NamedSharding):  # it says nothing of the axes that are new
        fits |= before.shape == factor.shape[: before.ndim]
    return jax.device_put(factor, before.sharding) if before.committed and fits else factor


def refresh(opt_state: Any, scale: Any) -> Any:
    """Write new factors into every `TempBalanceState` of an optimizer state.

    Args:
        opt_state: state of a chain with `tempbalance`, wrapped or not (`MultiSteps`, `masked`, `partition`,
            `nnx.Optimizer`).
        scale: tree like the parameters, as from `lr_scale`; a transform of some parameters takes theirs. Where the
            state is replicated, or holds one training for each seed, it may be that of one, for all.

    Returns:
        The same structure with the new factors, on the same devices; none shares its buffer.

    Raises:
        ValueError: there is no `TempBalanceState`, or `scale` does not fit.
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, TempBalanceState)

    def refreshed(node: Any) -> Any:
        if not is_ours(node):
            return node
        new = like(node.hyperparams[_RATES], scale, jnp.shape(node.count))
        return node._replace(hyperparams={**node.hyperparams, _RATES: new})

    if not any(map(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours))):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
        if any(_RATES in name_of(path).split("/") for path in paths):
            raise ValueError(
                "refresh: opt_state has factors, but in dicts and lists: it was restored without a target; "
                "restore it into tx.init(params)"
            )
        raise ValueError("refresh: no TempBalanceState in opt_state; add farms_jax.tempbalance(...) to the chain")
    return jax.tree.map(refreshed, opt_state, is_leaf=is_ours)
