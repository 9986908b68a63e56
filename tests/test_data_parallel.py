"""Training on several devices gives what one device gives: this file is also the program that has four, of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farms_jax.errors import InputError
from train import vgg
from train.config import Config
from train.parallel import make_mesh, on_all, spread
from train.steps import Normalise, TrainState, make_evaluate, make_network, make_optimizer, make_steps

STEPS, BATCH = 4, 16
CONFIG = Config(model="vgg16", width=0.0625, batch_size=BATCH, epochs=1, learning_rate=1e-3, augment=True)


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- In the process with four devices --------------------------------------------------------------------------------


class Training:
    """A small network and noise to train it on."""

    def __init__(self):
        vgg.CONVOLUTIONS[16] = (1, 1, 1, 1, 1)  # compiling takes most of the time
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 255, (STEPS * BATCH, 32, 32, 3), np.uint8)
        self.labels = rng.integers(0, 10, STEPS * BATCH)
        self.network, self.optimizer = make_network(CONFIG, 10), make_optimizer(CONFIG, STEPS)
        self.params, self.stats = jax.device_get(jax.jit(self.network.init)(jax.random.key(0)))

    def gradient(self, devices):
        """Gradient of one step in float64, in which another order of sums changes less than 1e-10."""
        mesh = make_mesh(devices, BATCH)

        def loss_of(params, stats, images, labels):
            index = spread(mesh, jnp.arange(BATCH))
            logits, _ = self.network.apply(params, stats, (images[index] / 255.0 - 0.5) / 0.25, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

        with jax.enable_x64(True):
            params, stats = jax.tree.map(np.float64, (self.params, self.stats))
            return jax.jit(jax.grad(loss_of))(*on_all(mesh, (params, stats, self.images, self.labels)))

    def train(self, devices):
        """Loss of the first step, loss of the test after all steps, and how far the parameters went."""
        mesh, normalise = make_mesh(devices, BATCH), Normalise(jnp.full(3, 0.5), jnp.full(3, 0.25))
        state = on_all(mesh, TrainState(self.params, self.stats, self.optimizer.init(self.params)))
        data = on_all(mesh, (jnp.asarray(self.images), jnp.asarray(self.labels)))
        steps = make_steps(self.network, self.optimizer, normalise, CONFIG, mesh)
        first = steps(state, np.zeros(2, np.float32), jax.random.key(1), 0, 1, *data)
        loss = float(first.loss)
        state = steps(first.state, np.asarray(first.sums), jax.random.key(1), 1, STEPS, *data).state
        tested = make_evaluate(self.network, normalise, mesh)(state, *data)
        assert len(jax.tree.leaves(state)[0].devices()) == devices
        moved = jax.tree.map(lambda after, before: np.asarray(after) - before, state.params, self.params)
        return [loss, float(tested["test_loss"])], moved


def apart(one, other):
    """Difference of two trees, relative to the norm of the first."""
    flat = [np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, other)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])


def check():
    training = Training()
    assert apart(training.gradient(1), training.gradient(4)) < 1e-10
    # In float32 rounding grows from step to step; a share that is left out moves all by tens of percent.
    (losses, moved), (losses_of_four, moved_by_four) = training.train(1), training.train(4)
    np.testing.assert_allclose(losses_of_four, losses, rtol=1e-3)
    assert apart(moved, moved_by_four) < 1e-2
    for devices, message in (
        (5, "--devices 5: JAX sees 4; give at most 4, or 0 for all"),
        (3, "--batch-size 16 must be a multiple of the 3 of --devices 3"),
        (-1, "--devices -1"),
    ):
        with pytest.raises(InputError, match=message):
            make_mesh(devices, BATCH)


if __name__ == "__main__":
    check()
