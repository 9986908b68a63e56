"""Trains on one device and on four that the CPU plays, and says as JSON what came out."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from farms_jax.errors import InputError
from train import vgg
from train.config import Config
from train.parallel import make_mesh, on_all, spread
from train.steps import Normalise, TrainState, make_evaluate, make_network, make_optimizer, make_steps

STEPS, BATCH = 4, 16
CONFIG = Config(model="vgg16", width=0.0625, batch_size=BATCH, epochs=1, learning_rate=1e-3, augment=True)
vgg.CONVOLUTIONS = {16: (1, 1, 1, 1, 1)}  # compiling takes most of the time
NETWORK, OPTIMIZER = make_network(CONFIG, 10), make_optimizer(CONFIG, STEPS)
NORMALISE = Normalise(jnp.full(3, 0.5), jnp.full(3, 0.25))
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (STEPS * BATCH, 32, 32, 3), np.uint8)
LABELS = RNG.integers(0, 10, STEPS * BATCH)
PARAMS, STATS = jax.device_get(jax.jit(NETWORK.init)(jax.random.key(0)))


def gradient(devices):
    """Gradient of one step, float64: what the devices compute in another order then differs by less than 1e-10."""
    mesh = make_mesh(devices, BATCH)

    def loss_of(params, stats, images, labels):
        index = spread(mesh, jnp.arange(BATCH))
        logits, _ = NETWORK.apply(params, stats, (images[index] / 255.0 - 0.5) / 0.25, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

    with jax.enable_x64(True):
        params, stats = jax.tree.map(np.float64, (PARAMS, STATS))
        return jax.jit(jax.grad(loss_of))(*on_all(mesh, (params, stats, IMAGES, LABELS)))


def train(devices):
    """Loss of the first step, what the test gives after all, and how far the parameters went."""
    mesh = make_mesh(devices, BATCH)
    state = on_all(mesh, TrainState(PARAMS, STATS, OPTIMIZER.init(PARAMS)))
    data = on_all(mesh, (jnp.asarray(IMAGES), jnp.asarray(LABELS)))
    steps = make_steps(NETWORK, OPTIMIZER, NORMALISE, CONFIG, mesh)
    first = steps(state, np.zeros(2, np.float32), jax.random.key(1), 0, 1, *data)
    loss = float(first.loss)
    last = steps(first.state, np.asarray(first.sums), jax.random.key(1), 1, STEPS, *data)
    tested = make_evaluate(NETWORK, NORMALISE, mesh)(last.state, *data)
    moved = jax.tree.map(lambda after, before: np.asarray(after) - before, last.state.params, PARAMS)
    return [loss, float(tested["test_loss"])], moved, jax.tree.leaves(last.state.params)[0].devices()


def refused(devices, batch_size):
    """What is said of a number of devices that cannot be."""
    try:
        make_mesh(devices, batch_size)
    except InputError as error:
        return str(error)
    return None


def apart(one, other):
    """Difference of two trees, relative to the norm of the first."""
    flat = [np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, other)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


alone, together = train(1), train(4)
json.dump(
    {
        "gradients apart": apart(gradient(1), gradient(4)),
        "losses": [alone[0], together[0]],
        "moves apart": apart(alone[1], together[1]),
        "devices": [len(alone[2]), len(together[2])],
        "refused": [refused(5, 16), refused(3, 16), refused(-1, 16)],
    },
    sys.stdout,
)
