"""One network's training: a step, an epoch under one jit, evaluation.

Everything is a pure function of a `TrainState` of plain arrays and an integer seed, so that a run continues exactly
from a checkpoint.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

import farms_jax
from train.config import Config
from train.layers import compiler_options
from train.models import MODELS

_EVAL_BATCH = 500
_PADDING = 4


class TrainState(NamedTuple):
    """Arrays only: nested dicts with string keys, and the optimizer's own state."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any


class Network(NamedTuple):
    """Pure functions of one architecture: logits and new batch statistics of images (N, 32, 32, 3), float32."""

    init: Callable[[Array], tuple[dict[str, Any], dict[str, Any]]]
    apply: Callable[..., tuple[Array, dict[str, Any]]]


def make_network(config: Config, num_classes: int) -> Network:
    """Turn the Flax NNX model of a config into pure functions of plain dicts.

    Args:
        config: resolved.
        num_classes: outputs.

    Returns:
        `init(key) -> (params, batch_stats)` and `apply(params, batch_stats, images, train=...)`.
    """
    dtype = jnp.bfloat16 if config.bfloat16 else None

    def build(key: Array) -> Any:
        return MODELS[config.model].build(num_classes=num_classes, width=config.width, dtype=dtype, rngs=nnx.Rngs(key))

    graph, *_ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)

    def init(key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        _, params, stats = nnx.split(build(key), nnx.Param, ...)
        return _plain(nnx.to_pure_dict(params)), _plain(nnx.to_pure_dict(stats))

    def apply(params: Any, stats: Any, images: Array, *, train: bool) -> tuple[Array, dict[str, Any]]:
        states = (nnx.State(nnx.restore_int_paths(tree)) for tree in (params, stats))
        model = nnx.merge(graph, *states, copy=True)
        model.train() if train else model.eval()
        logits = model(images)
        _, _, new_stats = nnx.split(model, nnx.Param, ...)
        return logits.astype(jnp.float32), _plain(nnx.to_pure_dict(new_stats))

    return Network(init, apply)


def _plain(tree: Any) -> Any:
    """String keys throughout: checkpoints and names need them."""
    return {str(key): _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """SGD as the reference has it, TempBalance last.

    Args:
        config: resolved.
        steps_per_epoch: the cosine moves once an epoch.

    Returns:
        The chain; its `learning_rate` and `lr_scale` are visible state.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.inject_hyperparams(optax.sgd)(
            learning_rate=lambda step: _cosine(config, step // steps_per_epoch), momentum=config.momentum
        ),
        farms_jax.tempbalance(refresh_every=None),
    )


def cosine_rate(config: Config, epoch: int) -> float:
    """Global learning rate of an epoch, counted from 0."""
    return float(_cosine(config, epoch))


def _cosine(config: Config, epoch: Any) -> Any:
    assert config.learning_rate is not None and config.epochs is not None
    return 0.5 * config.learning_rate * (1 + jnp.cos(jnp.pi * epoch / config.epochs))


class Normalise(NamedTuple):
    """Statistics of the training images, in [0, 1], shape (3,)."""

    mean: Array
    std: Array

    def __call__(self, images: Array) -> Array:
        """Uint8 (..., 3) to float32 of mean 0 and standard deviation 1."""
        return (images.astype(jnp.float32) / 255 - self.mean) / self.std


def augment(key: Array, images: Array) -> Array:
    """Crop at random with padding 4, and flip half of them; (N, H, W, 3), any dtype."""
    crop_key, flip_key = jax.random.split(key)
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    corners = jax.random.randint(crop_key, (count, 2), 0, 2 * _PADDING + 1)
    crop = jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), (height, width, channels)))
    flipped = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    cropped = crop(padded, corners)
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def make_epoch(
    network: Network, optimizer: optax.GradientTransformationExtraArgs, normalise: Normalise, config: Config
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Compile a whole epoch.

    Args:
        network: of `make_network`.
        optimizer: of `make_optimizer`.
        normalise: statistics of the images.
        config: resolved.

    Returns:
        `epoch(state, key, images, labels) -> (state, metrics)`: every image once, in an order drawn from the key,
        less the rest that fills no batch; metrics are `train_loss` and `train_accuracy`, float32 scalars.
    """
    assert config.batch_size is not None
    batch_size = config.batch_size

    def loss_of(params: Any, stats: Any, images: Array, labels: Array) -> tuple[Array, tuple[Array, Any]]:
        logits, stats = network.apply(params, stats, images, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, ((logits.argmax(-1) == labels).mean(), stats)

    def step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, tuple[Array, Array]]:
        (loss, (accuracy, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, images, labels
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state), (loss, accuracy)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def epoch(state: TrainState, key: Array, images: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        order_key, augment_key = jax.random.split(key)
        steps = labels.size // batch_size
        order = jax.random.permutation(order_key, labels.size)[: steps * batch_size].reshape(steps, batch_size)

        def one_step(state: TrainState, batch: tuple[Array, Array]) -> tuple[TrainState, tuple[Array, Array]]:
            index, key = batch
            chosen = augment(key, images[index]) if config.augment else images[index]
            return step(state, normalise(chosen), labels[index])

        state, (losses, accuracies) = lax.scan(one_step, state, (order, jax.random.split(augment_key, steps)))
        return state, {"train_loss": losses.mean(), "train_accuracy": accuracies.mean()}

    return epoch


def make_evaluate(network: Network, normalise: Normalise) -> Callable[[TrainState, Array, Array], dict[str, Array]]:
    """Compile the evaluation on all images, in batches, the last one padded and masked.

    Args:
        network: of `make_network`.
        normalise: statistics of the images.

    Returns:
        `evaluate(state, images, labels) -> metrics` with `test_loss` and `test_accuracy`, float32 scalars.
    """

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def evaluate(state: TrainState, images: Array, labels: Array) -> dict[str, Array]:
        size = min(_EVAL_BATCH, labels.size)
        pad = -labels.size % size
        index = jnp.pad(jnp.arange(labels.size), (0, pad), constant_values=-1).reshape(-1, size)

        def batch(index: Array) -> tuple[Array, Array]:
            logits, _ = network.apply(state.params, state.batch_stats, normalise(images[index]), train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            right = logits.argmax(-1) == labels[index]
            return jnp.where(index >= 0, losses, 0).sum(), ((index >= 0) & right).sum()

        losses, right = lax.map(batch, index)
        return {"test_loss": losses.sum() / labels.size, "test_accuracy": right.sum() / labels.size}

    return evaluate
