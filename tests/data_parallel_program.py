"""Trains a few steps on one device and on four that the CPU plays, and says as JSON what came out."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np

from farms_jax.errors import InputError
from train.config import Config
from train.parallel import make_mesh, on_all, spread_over
from train.steps import Normalise, TrainState, make_evaluate, make_network, make_optimizer, make_steps

STEPS = 4
# A low rate: rounding grows with every step, the faster the higher the rate.
CONFIG = Config(model="vgg16", width=0.0625, batch_size=16, epochs=1, learning_rate=1e-3, augment=True)


def train(devices):
    """Losses, what the test gives, the parameters, and on how many devices these are."""
    network, optimizer = make_network(CONFIG, 10), make_optimizer(CONFIG, STEPS)
    mesh, normalise = make_mesh(devices, CONFIG.batch_size), Normalise(jnp.full(3, 0.5), jnp.full(3, 0.25))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (STEPS * 16, 32, 32, 3), np.uint8), rng.integers(0, 10, STEPS * 16)
    params, stats = jax.jit(network.init)(jax.random.key(0))
    state = on_all(mesh, TrainState(params, stats, optimizer.init(params)))
    data, sums = on_all(mesh, (jnp.asarray(images), jnp.asarray(labels))), np.zeros(2, np.float32)
    steps, losses = make_steps(network, optimizer, normalise, CONFIG, spread_over(mesh)), []
    for step in range(STEPS):
        piece = steps(state, sums, jax.random.key(1), step, step + 1, *data)
        state, sums = piece.state, piece.sums
        losses.append(float(piece.loss))
    tested = make_evaluate(network, normalise, spread_over(mesh))(state, *data)
    leaves = jax.tree.leaves(state.params)
    return losses, {name: float(value) for name, value in tested.items()}, leaves


def refused(devices, batch_size):
    """What is said of a number of devices that cannot be."""
    try:
        make_mesh(devices, batch_size)
    except InputError as error:
        return str(error)
    return None


alone, together = train(1), train(4)
flat = [np.concatenate([np.asarray(leaf).ravel() for leaf in run[2]]) for run in (alone, together)]
json.dump(
    {
        "losses": [alone[0], together[0]],
        "tests": [alone[1], together[1]],
        "apart": float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])),
        "devices": [len(run[2][0].devices()) for run in (alone, together)],
        "refused": [refused(5, 16), refused(3, 16), refused(-1, 16)],
    },
    sys.stdout,
)
