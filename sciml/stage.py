"""One stage of a run: a network trained on one data set from given weights, in a directory of its own."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import farms_jax
from farms_jax.errors import InputError
from farms_jax.rundir import SeedDirectory, layer_rows
from sciml.batches import test_batches, train_batches
from sciml.config import TB, Config
from sciml.fields import FieldData, Fields
from sciml.layers import ENDS, FOLLOW, measure
from sciml.loop import Evaluate, Step, TrainState, make_step
from sciml.model import Network
from sciml.optimizer import make_optimizer, schedules


class Stage(NamedTuple):
    """What one training needs.

    Attributes:
        name: for the progress bar.
        tb: how the layers get their rates.
        seed: of order, start steps and noise.
        config: resolved; its epochs, rate and batch are this stage's.
        data: trajectories.
        params: to start from.
    """

    name: str
    tb: TB
    seed: int
    config: Config
    data: FieldData
    params: Any


class Functions(NamedTuple):
    """Compiled functions, shared by stages of one config, network and data."""

    step: Step
    evaluate: Evaluate
    optimizer: Any
    steps_per_epoch: int


def make_functions(network: Network, config: Config, data: FieldData, evaluate: Evaluate) -> Functions:
    """Make the functions that train on `data`; each compiles at its first call.

    Args:
        network: of `sciml.model`.
        config: resolved.
        data: what to train on.
        evaluate: of `sciml.loop.make_evaluate`.

    Returns:
        The functions.
    """
    steps = -(-len(data.train) // _batch_size(config, data.train))
    optimizer = make_optimizer(config, steps)
    return Functions(make_step(network, optimizer, config), evaluate, optimizer, steps)


def train_stage(directory: SeedDirectory, stage: Stage, functions: Functions) -> TrainState:
    """Train, from where the directory stands; every epoch ends with a test, its lines and a checkpoint.

    Args:
        directory: of the stage.
        stage: what to train.
        functions: of `make_functions`.

    Returns:
        The final state.

    Raises:
        InputError: the loss is not finite.
    """
    config = stage.config
    assert config.epochs is not None
    params = jax.tree.map(jnp.array, stage.params)  # a copy: the step donates it
    state, done = directory.restore(TrainState(params, functions.optimizer.init(params)))
    rate_at = schedules(config, functions.steps_per_epoch)[0]
    refresh = make_refresh(config, stage.tb)
    best = min((line["test_l2re"] for line in directory.metrics()), default=np.inf)
    total, start_at = config.epochs * functions.steps_per_epoch, done * functions.steps_per_epoch
    with tqdm(total=total, initial=start_at, desc=stage.name, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(done, config.epochs):
            start = time.perf_counter()
            rate = float(rate_at(epoch * functions.steps_per_epoch))
            state, layers, refresh_seconds = refresh(state, epoch, rate)
            directory.append_layers(layers)
            state, trained = run_epoch(state, stage, functions, epoch, bar)
            if not np.isfinite(loss := trained["train_l2re_step"]):
                raise InputError(
                    f"{stage.name}: the loss is {loss} in epoch {epoch}, of which nothing is kept; start anew with a "
                    "lower --learning-rate (--pretrain-rate in pretraining) or --clip"
                )
            tested = run_test(state.params, stage.data.test, config, functions.evaluate)
            line = {"epoch": epoch, "learning_rate": rate, **trained, **tested}
            line |= {"seconds": time.perf_counter() - start, "refresh_seconds": refresh_seconds}
            directory.append_metrics(line)
            if line["test_l2re"] < best:
                best = line["test_l2re"]
                directory.save_best(state, epoch + 1)
            directory.save(state, epoch + 1)
            bar.set_postfix(train=f"{line['train_l2re_step']:.4f}", test=f"{line['test_l2re']:.4f}")
    directory.append_layers(refresh(state, config.epochs, float(rate_at(total)))[1])
    return state


def run_epoch(state: TrainState, stage: Stage, functions: Functions, epoch: int, bar: Any) -> tuple[TrainState, dict]:
    """Train on every trajectory once.

    Args:
        state: donated.
        stage: what to train.
        functions: of `make_functions`.
        epoch: number of the epoch.
        bar: progress, moved by one a step.

    Returns:
        The state, and `train_l2re_step` and `train_l2re`: per prediction and over all of them, means over trajectories.
    """
    config, batch_size = stage.config, _batch_size(stage.config, stage.data.train)
    key = jax.random.fold_in(jax.random.key(stage.seed), epoch)
    steps = config.in_steps + config.rollout_steps
    drawn = train_batches(stage.data.train, batch_size=batch_size, steps=steps, seed=stage.seed, epoch=epoch)
    sums = []
    for index, batch in enumerate(drawn):
        state, losses = functions.step(state, jax.random.fold_in(key, index), batch.fields, batch.weights)
        sums.append(losses)
        bar.update()
    per_prediction, whole = np.sum(jax.device_get(sums), axis=0) / len(stage.data.train)
    return state, {"train_l2re_step": float(per_prediction), "train_l2re": float(whole)}


def run_test(params: Any, fields: Fields, config: Config, evaluate: Evaluate) -> dict[str, Any]:
    """Roll out every test trajectory.

    Every point of the model's grid counts. DPOT's code leaves out points that it interpolated between stored ones;
    at the resolution of the data, as in the paper, there are none.

    Args:
        params: of the network.
        fields: test trajectories.
        config: resolved.
        evaluate: of `make_evaluate`.

    Returns:
        `test_l2re` over whole rollouts, `test_l2re_step` the mean of its steps, and `test_l2re_by_step`, a list; means
        over trajectories.
    """
    whole, by_step = [], []
    for batch in test_batches(fields, batch_size=_batch_size(config, fields)):
        errors, errors_by_step = jax.device_get(evaluate(params, batch.fields))
        counted = batch.weights > 0
        whole.append(errors[counted])
        by_step.append(errors_by_step[counted])
    steps = np.concatenate(by_step).mean(0)
    return {
        "test_l2re": float(np.concatenate(whole).mean()),
        "test_l2re_step": float(steps.mean()),
        "test_l2re_by_step": steps.tolist(),
    }


def _batch_size(config: Config, fields: Fields) -> int:
    """Trajectories in a step: no more than there are, as the rest would be padding."""
    assert config.batch_size is not None
    return min(config.batch_size, len(fields))


@functools.cache  # compiled once for all stages of a run
def _scale_of(low: float, high: float, slope: float) -> Callable[..., Any]:
    sigmoid = functools.partial(farms_jax.mappings.sigmoid, slope=slope)
    return jax.jit(functools.partial(farms_jax.lr_scale, low=low, high=high, mapping=sigmoid, follow=FOLLOW))


def make_refresh(
    config: Config, tb: TB
) -> Callable[[TrainState, int, float], tuple[TrainState, list[dict[str, Any]], float]]:
    """Make the function that measures the layers and sets their rates, at the start of an epoch.

    Args:
        config: resolved.
        tb: none leaves the rates alone and measures only.

    Returns:
        `refresh(state, epoch, rate) -> (state, rows of layers.csv, seconds)`.
    """
    scale_of = _scale_of(*config.bounds(), config.slope)

    def refresh(state: TrainState, epoch: int, rate: float) -> tuple[TrainState, list[dict[str, Any]], float]:
        start = time.perf_counter()
        report = measure(state.params, analyse=config.layers, window=config.window_of(tb), tail=config.tail())
        scale = jax.tree.map(lambda _: jnp.ones((), jnp.float32), state.params)
        if tb != "none":
            # An end with too few eigenvalues is not in the report in the first place.
            ends = [name for name in ENDS if config.layer_selection and name in report.names]
            scale = scale_of(report.drop(ends), state.params)
        state = state._replace(opt_state=farms_jax.refresh(state.opt_state, scale))
        # Arrays that were never put on a device by name would have the step compiled anew after its first call.
        state = jax.block_until_ready(jax.device_put(state, jax.devices()[0]))
        return state, layer_rows(report, scale, rate, epoch), time.perf_counter() - start

    return refresh
