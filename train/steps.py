"""One network's training: the steps of an epoch under one jit, evaluation.

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
from jax.sharding import Mesh

import farms_jax
from farms_jax.programs.finite import Call, call, first_not_finite, norm

from .config import Config
from .cpu_gradients import compiler_options
from .models import MODELS
from .parallel import spread

_EVAL_BATCH = 512  # a multiple of any usual number of devices
_PADDING = 4  # pixels that a crop may move in each direction


class TrainState(NamedTuple):
    """Arrays only: nested dicts with string keys, and the optimizer's own state."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any


class Piece(NamedTuple):
    """Where some steps of an epoch ended: at the last one, or before the first that is not finite."""

    state: TrainState
    sums: Array  # (2,) float32: loss and accuracy of the batches, summed over the epoch's finished steps
    step: Array  # the epoch's finished steps
    loss: Array  # of the last step tried
    is_finite: Array  # whether loss and gradient of that step are finite


class Network(NamedTuple):
    """Pure functions of one architecture: logits and new batch statistics of images (N, 32, 32, 3), float32."""

    init: Callable[[Array], tuple[dict[str, Any], dict[str, Any]]]
    apply: Callable[..., tuple[Array, dict[str, Any]]]


def make_network(config: Config, num_classes: int) -> Network:
    """Return the Flax NNX model of a config as pure functions of plain dicts.

    They are `init(key) -> (params, batch_stats)` and `apply(params, batch_stats, images, train=..., call=...)`, whose
    `call` is that of `farms_jax.programs.finite`.
    """
    dtype = jnp.bfloat16 if config.bfloat16 else None

    def build(key: Array) -> Any:
        return MODELS[config.model].build(num_classes=num_classes, width=config.width, dtype=dtype, rngs=nnx.Rngs(key))

    graph, *_ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)

    def init(key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        _, params, stats = nnx.split(build(key), nnx.Param, ...)
        return _plain(nnx.to_pure_dict(params)), _plain(nnx.to_pure_dict(stats))

    def apply(
        params: Any, stats: Any, images: Array, *, train: bool, call: Call = call
    ) -> tuple[Array, dict[str, Any]]:
        states = (nnx.State(nnx.restore_int_paths(tree)) for tree in (params, stats))
        model = nnx.merge(graph, *states, copy=True)
        model.train() if train else model.eval()
        logits = call(model, images)
        _, _, new_stats = nnx.split(model, nnx.Param, ...)
        return logits.astype(jnp.float32), _plain(nnx.to_pure_dict(new_stats))

    return Network(init, apply)


def _plain(tree: Any) -> Any:
    """Make all keys strings, as checkpoints and names need them."""
    return {str(key): _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """Return SGD as the reference has it, with a cosine that moves once an epoch, and TempBalance last."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.inject_hyperparams(optax.sgd)(
            learning_rate=lambda step: cosine_rate(config, step // steps_per_epoch), momentum=config.momentum
        ),
        farms_jax.tempbalance(refresh_every=None),
    )


def cosine_rate(config: Config, epoch: int | Array) -> Array:
    """Return the global learning rate of an epoch, counted from 0."""
    assert config.learning_rate is not None and config.epochs is not None
    return 0.5 * config.learning_rate * (1 + jnp.cos(jnp.pi * epoch / config.epochs))


class Normalise(NamedTuple):
    """Statistics of the training images, in [0, 1], shape (3,)."""

    mean: Array
    std: Array

    def __call__(self, images: Array) -> Array:
        """Turn uint8 (..., 3) into float32 of mean 0 and standard deviation 1."""
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


def make_steps(
    network: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    normalise: Normalise,
    config: Config,
    mesh: Mesh | None = None,
) -> Callable[..., Piece]:
    """Return `steps(state, sums, key, first, last, images, labels) -> Piece`: steps of an epoch under one jit.

    They are the steps `first` to `last - 1` of the epoch with that key; state and sums are donated. They end before a
    step whose loss, or the norm of whose gradient, is not finite, so that the weights always are.

    An epoch takes every image once, in an order drawn from its key, less the rest that fills no batch. Its state and
    sums do not depend on how many calls it is made of.
    """

    def step(piece: Piece, images: Array, labels: Array) -> Piece:
        state = piece.state
        (loss, (accuracy, stats)), grads = jax.value_and_grad(_loss, argnums=1, has_aux=True)(
            network.apply, state.params, state.batch_stats, images, labels
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm(grads))
        sums = piece.sums + jnp.stack([loss, accuracy])
        after = Piece(TrainState(params, stats, opt_state), sums, piece.step + 1, loss, is_finite)
        # The memory of the state before is that of the state after: entry by entry one of them is written.
        before = piece._replace(loss=loss, is_finite=is_finite)
        return jax.tree.map(functools.partial(jnp.where, is_finite), after, before)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options())
    def steps(
        state: TrainState, sums: Array, key: Array, first: Array, last: Array, images: Array, labels: Array
    ) -> Piece:
        batch = _batches(config, normalise, key, images, labels, mesh)
        start = Piece(state, sums, jnp.asarray(first, jnp.int32), jnp.zeros(()), jnp.array(True))
        return lax.while_loop(
            lambda piece: piece.is_finite & (piece.step < last), lambda piece: step(piece, *batch(piece.step)), start
        )

    return steps


def _loss(
    apply: Callable[..., Any], params: Any, stats: Any, images: Array, labels: Array
) -> tuple[Array, tuple[Array, Any]]:
    """Return the loss of a batch; beside it accuracy and new statistics."""
    logits, stats = apply(params, stats, images, train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, ((logits.argmax(-1) == labels).mean(), stats)


def _batches(
    config: Config, normalise: Normalise, key: Array, images: Array, labels: Array, mesh: Mesh | None
) -> Callable[[Array], tuple[Array, Array]]:
    """Draw the order of an epoch; return the function from a step to its batch, images normalised."""
    assert config.batch_size is not None
    order_key, augment_key = jax.random.split(key)
    steps = labels.size // config.batch_size
    order = jax.random.permutation(order_key, labels.size)[: steps * config.batch_size].reshape(steps, -1)
    keys = jax.random.split(augment_key, steps)

    def batch(step: Array) -> tuple[Array, Array]:
        index = spread(mesh, order[step])
        chosen = augment(keys[step], images[index]) if config.augment else images[index]
        return normalise(chosen), labels[index]

    return batch


def make_fault(network: Network, normalise: Normalise, config: Config) -> Callable[..., str]:
    """Return `fault(state, key, step, images, labels)`: it names what in a step is the first that is not finite.

    It takes the state before the step, the key of its epoch, and its number there; see `first_not_finite`.
    """

    def loss_of(params: Any, *inputs: Any, call: Call = call) -> Array:
        return _loss(functools.partial(network.apply, call=call), params, *inputs)[0]

    def fault(state: TrainState, key: Array, step: int, images: Array, labels: Array) -> str:
        draw = jax.jit(lambda key, step, *data: _batches(config, normalise, key, *data, mesh=None)(step))
        batch = draw(key, step, images, labels)
        return first_not_finite(loss_of, state.params, state.batch_stats, *batch, compiler_options=compiler_options())

    return fault


def make_evaluate(
    network: Network, normalise: Normalise, mesh: Mesh | None = None
) -> Callable[[TrainState, Array, Array], dict[str, Array]]:
    """Return `evaluate(state, images, labels)`: `test_loss` and `test_accuracy` over all images, float32 scalars."""

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def evaluate(state: TrainState, images: Array, labels: Array) -> dict[str, Array]:
        size = min(_EVAL_BATCH, labels.size)
        pad = -labels.size % size  # the last batch is padded, and the padding (index -1) masked
        index = jnp.pad(jnp.arange(labels.size), (0, pad), constant_values=-1).reshape(-1, size)

        def batch(index: Array) -> tuple[Array, Array]:
            index = spread(mesh, index)
            logits, _ = network.apply(state.params, state.batch_stats, normalise(images[index]), train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            right = logits.argmax(-1) == labels[index]
            return jnp.where(index >= 0, losses, 0).sum(), ((index >= 0) & right).sum()

        losses, right = lax.map(batch, index)
        return {"test_loss": losses.sum() / labels.size, "test_accuracy": right.sum() / labels.size}

    return evaluate
