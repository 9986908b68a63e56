"""One stage of a run: a network trained on one data set from given weights, in a directory of its own."""

import contextlib
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
from farms_jax.programs.finite import not_finite
from farms_jax.programs.rundir import Progress, SeedDirectory, layer_rows
from farms_jax.programs.stopping import StopRequest, hold_stops

from .batches import test_batches, train_batches
from .config import TB, Config
from .fields import FieldData, Fields
from .layers import ENDS, FOLLOW, measure
from .loop import Evaluate, Step, TrainState, make_fault, make_step
from .model import Network
from .optimizer import make_optimizer, schedules

SUMS = ("train_l2re_step", "train_l2re")  # of the first two numbers that a step measures


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
    fault: Callable[..., str]


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
    step, fault = make_step(network, optimizer, config), make_fault(network, config)
    return Functions(step, evaluate, optimizer, steps, fault)


def train_stage(directory: SeedDirectory, stage: Stage, functions: Functions) -> TrainState:
    """Train, from where the directory stands; every epoch ends with a test, its lines and a checkpoint.

    Args:
        directory: of the stage.
        stage: what to train.
        functions: of `make_functions`.

    Returns:
        The final state.

    Raises:
        InputError: a loss or a gradient is not finite; the state before that step is the last checkpoint then.
        Stopped: by Ctrl-C or SIGTERM; there is a checkpoint of the step where it came.
    """
    config, steps = stage.config, functions.steps_per_epoch
    assert config.epochs is not None
    params = jax.tree.map(jnp.array, stage.params)  # a copy: the step donates it
    at = directory.restore(TrainState(params, functions.optimizer.init(params)))
    rate_at, refresh = schedules(config, steps)[0], make_refresh(config, stage.tb)
    best, total = min((line["test_l2re"] for line in directory.metrics()), default=np.inf), config.epochs * steps
    bar = tqdm(total=total, initial=at.done, desc=stage.name, unit="step", dynamic_ncols=True)
    with bar, hold_stops() as stop:
        for epoch in range(at.done // steps, config.epochs):
            rate = float(rate_at(epoch * steps))
            if not at.so_far:
                state, layers, seconds = refresh(at.state, epoch, rate)
                directory.append_layers(layers)
                sums = dict.fromkeys(SUMS, 0.0)
                at = Progress(state, at.done, {**sums, "seconds": seconds, "refresh_seconds": seconds})
            at = _run_epoch(directory, stage, functions, at, stop, bar)
            line = {"epoch": epoch, "learning_rate": rate, **_measure(stage, functions, at)}
            directory.append_metrics(line)
            at = Progress(at.state, at.done, {})
            if line["test_l2re"] < best:
                best = line["test_l2re"]
                directory.save_best(at.state, at.done)
            directory.save(*at)
            bar.set_postfix(train=f"{line['train_l2re_step']:.4f}", test=f"{line['test_l2re']:.4f}")
            stop.obey()
    directory.append_layers(refresh(at.state, config.epochs, float(rate_at(total)))[1])
    return at.state


def _run_epoch(
    directory: SeedDirectory, stage: Stage, functions: Functions, at: Progress, stop: StopRequest, bar: tqdm
) -> Progress:
    """Train on every trajectory once, or on those that are left of a broken epoch; `so_far` has the sums over them."""
    steps, config = functions.steps_per_epoch, stage.config
    epoch, first = divmod(at.done, steps)
    key = jax.random.fold_in(jax.random.key(stage.seed), epoch)
    drawn = train_batches(
        stage.data.train,
        batch_size=_batch_size(config, stage.data.train),
        steps=config.in_steps + config.rollout_steps,
        seed=stage.seed,
        epoch=epoch,
        first=first,
    )
    start = time.perf_counter() - at.so_far["seconds"]
    with contextlib.closing(drawn):
        batches = map(jax.device_put, drawn)
        batch = next(batches, None)
        while batch is not None:
            step_key, used = jax.random.fold_in(key, at.done % steps), batch
            state, measured = functions.step(at.state, step_key, *used)
            batch = next(batches, None)  # goes to the device while the step runs
            measured = np.asarray(measured)
            if not np.isfinite(measured).all():
                inputs = step_key, *used
                raise _not_finite(directory, stage, functions, at._replace(state=state), measured, inputs)
            sums = {name: float(np.float32(at.so_far[name]) + part) for name, part in zip(SUMS, measured, strict=False)}
            at = Progress(state, at.done + 1, {**at.so_far, **sums, "seconds": time.perf_counter() - start})
            bar.update()
            if stop and batch is not None:  # after the last one the test and the epoch's lines come first
                directory.save(*at)
                stop.obey()
    return at


def _not_finite(
    directory: SeedDirectory,
    stage: Stage,
    functions: Functions,
    at: Progress,
    measured: np.ndarray,
    inputs: tuple[Any, ...],
) -> InputError:
    """Keep the state before the step, and find out what went wrong in it."""
    epoch, step = divmod(at.done, functions.steps_per_epoch)
    return not_finite(
        stage.name,
        (epoch + 1, step + 1),
        at.done + 1,
        loss=float(measured[:2].sum()),
        kept=directory.save(*at),
        first=functions.fault(at.state.params, *inputs),
        advice="a lower --learning-rate (--pretrain-rate in pretraining) or --clip",
    )


def _measure(stage: Stage, functions: Functions, at: Progress) -> dict[str, Any]:
    """What `metrics.jsonl` says of a finished epoch, its test included."""
    start = time.perf_counter()
    trained = {name: at.so_far[name] / len(stage.data.train) for name in SUMS}
    tested = run_test(at.state.params, stage.data.test, stage.config, functions.evaluate)
    seconds = at.so_far["seconds"] + time.perf_counter() - start
    return {**trained, **tested, "seconds": seconds, "refresh_seconds": at.so_far["refresh_seconds"]}


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
