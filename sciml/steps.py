"""Autoregressive steps of DPOT (training, rollout, evaluation) and their relative L2 error (L2RE); pure functions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from farms_jax.programs.finite import Call, call, first_not_finite, norm

from .config import Config
from .model import Network

_FLOOR = 1e-8  # on the norm of the truth, as DPOT's criterion has it


class TrainState(NamedTuple):
    """Arrays only: nested dicts with string keys, and the optimizer's own state."""

    params: dict[str, Any]
    opt_state: Any


Step = Callable[..., tuple[TrainState, Array]]
Evaluate = Callable[[Any, Any], tuple[Array, Array]]


def make_step(network: Network, optimizer: optax.GradientTransformationExtraArgs, config: Config) -> Step:
    """Return the compiled `step(state, key, fields (B, X, Y, T, C), weights (B,)) -> (state, measured (3,))`.

    T is `in_steps + rollout_steps`. Measured are L2RE per prediction and over all of them, each summed over samples,
    and the norm of the gradient. The state is donated, and comes back unchanged where not all of that is finite.

    The loss is the sum over samples and predictions, as in DPOT's code; predictions are fed back and differentiated
    through. Noise is relative to the norm of a sample's whole input, drawn anew for each prediction.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, key: Array, fields: Array, weights: Array) -> tuple[TrainState, Array]:
        (error, whole), gradients = jax.value_and_grad(_loss, argnums=2, has_aux=True)(
            network.apply, config, state.params, key, fields, weights
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        per_prediction = error * config.bundle / config.rollout_steps
        measured = jnp.stack([per_prediction, whole, norm(gradients)])
        is_finite = jnp.isfinite(measured).all()  # else the state before is kept, for a checkpoint to resume from
        return jax.tree.map(functools.partial(jnp.where, is_finite), TrainState(params, opt_state), state), measured

    return step


def _loss(
    apply: Callable[..., Any], config: Config, params: Any, key: Array, fields: Array, weights: Array
) -> tuple[Array, Array]:
    """Return L2RE of a batch, summed over samples: the sum over single predictions, and that of all together."""
    seen, future = jnp.split(fields, [config.in_steps], axis=-2)
    predicted, errors = [], jnp.zeros(())
    for index, true in enumerate(jnp.split(future, config.rollout_steps // config.bundle, axis=-2)):
        noisy = add_noise(jax.random.fold_in(key, index), seen, config.noise) if config.noise else seen
        prediction, _ = apply(params, noisy)
        errors += (weights * relative_l2(prediction, true)).sum()
        predicted.append(prediction)
        # What is fed back is the noisy input, as in the original.
        seen = jnp.concatenate([noisy[..., config.bundle :, :], prediction], axis=-2)
    whole = relative_l2(jnp.concatenate(predicted, axis=-2), future)
    return errors, (weights * whole).sum()


def make_fault(network: Network, config: Config) -> Callable[..., str]:
    """Return `fault(params, key, fields, weights)`, which names the first thing in a step that is not finite."""

    def loss_of(params: Any, *inputs: Any, call: Call = call) -> Array:
        return _loss(functools.partial(network.apply, call=call), config, params, *inputs)[0]

    return functools.partial(first_not_finite, loss_of)


def add_noise(key: Array, fields: Array, scale: float) -> Array:
    """Add Gaussian noise to fields (B, X, Y, T, C), `scale` times the norm of each sample's channel."""
    norm = jnp.sqrt((fields**2).sum((1, 2, 3), keepdims=True))
    return fields + scale * norm * jax.random.normal(key, fields.shape, fields.dtype)


def rollout(network: Network, params: Any, seen: Array, steps: int) -> Array:
    """Return `steps` predictions, (B, X, Y, steps, C), each fed back; `seen` is (B, X, Y, in_steps, C)."""
    bundle = jax.eval_shape(network.apply, params, seen)[0].shape[-2]

    def one(seen: Array, _: Any) -> tuple[Array, Array]:
        prediction, _ = network.apply(params, seen)
        return jnp.concatenate([seen[..., bundle:, :], prediction], axis=-2), prediction

    # The last bundle may reach beyond the steps asked for, and is cut.
    _, predictions = lax.scan(one, seen, None, length=-(-steps // bundle))  # (N, B, X, Y, bundle, C)
    ordered = jnp.moveaxis(predictions, 0, -3)
    return ordered.reshape(*seen.shape[:3], -1, seen.shape[-1])[..., :steps, :]


def make_evaluate(network: Network, config: Config) -> Evaluate:
    """Return the compiled `evaluate(params, fields (B, X, Y, T, C)) -> (whole (B,), by_step (B, S))`.

    Both are L2RE: over the whole rollout, and at each of its S steps.
    """

    @jax.jit
    def evaluate(params: Any, fields: Array) -> tuple[Array, Array]:
        seen, future = jnp.split(fields, [config.in_steps], axis=-2)
        future = future[..., : config.test_steps, :]
        predicted = rollout(network, params, seen, future.shape[-2])
        return relative_l2(predicted, future), relative_l2(predicted, future, axes=(1, 2))

    return evaluate


def relative_l2(predicted: Array, true: Array, axes: tuple[int, ...] = (1, 2, 3)) -> Array:
    """Return the L2RE of each sample, (B,): |predicted - true| / |true| by channel, then the mean over channels.

    The norms are over space and all T steps of fields (B, X, Y, T, C); with the axes of space alone, (1, 2), the result
    is (B, T). As `SimpleLpLoss` of DPOT's code; Hao et al., DPOT, ICML 2024, section 5.

    >>> true = jnp.ones((1, 4, 4, 2, 3))
    >>> relative_l2(true.at[..., 0].mul(1.3), true).round(3)
    Array([0.1], dtype=float32)
    """

    def norm(fields: Array) -> Array:
        # Zero has no gradient under the root; an exact prediction has an error of 0, and one that is NaN has NaN.
        squares = (fields**2).sum(axes)
        exact = squares == 0
        return jnp.where(exact, 0, jnp.sqrt(jnp.where(exact, 1, squares)))

    return (norm(predicted - true) / (norm(true) + _FLOOR)).mean(-1)
