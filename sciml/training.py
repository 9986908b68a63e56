"""A run: pretraining where asked, and fine-tuning with each setting and seed; each of these is a stage."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import farms_jax
from farms_jax.programs.epoch_loop import Epochs, Refreshed, StepsTaken, run_epochs
from farms_jax.programs.files import write_json
from farms_jax.programs.run_directory import SeedDirectory

from . import checkpoints
from .balanced_layers import ENDS, FOLLOW, measure
from .batches import test_batches, train_batches
from .config import TB, Config
from .fields import FieldData, Fields
from .model import ModelConfig, Network
from .optimizer import make_optimizer, schedules
from .preparation import Experiment
from .results import Results, plot_run, summarise, table
from .steps import Evaluate, Step, TrainState, make_evaluate, make_fault, make_step

_SUMS = ("train_l2re_step", "train_l2re")  # the first two numbers that a step measures


class Stage(NamedTuple):
    """One training: settings whose epochs, rate and batch are this stage's, data and start."""

    name: str  # for the progress bar
    tb: TB
    seed: int  # draws the order, the first time steps and the noise
    config: Config
    data: FieldData
    params: Any


class Functions(NamedTuple):
    """Compiled functions, which stages of one config, network and data share."""

    step: Step
    evaluate: Evaluate
    optimizer: Any
    steps_per_epoch: int
    fault: Callable[..., str]


def run_experiment(run: Path, experiment: Experiment) -> str:
    """Pretrain if asked, fine-tune with every setting and seed, write summary and plots; return the results table."""
    for line in (*experiment.notes, f"{experiment.title()} -> {run}"):
        tqdm.write(line)
    config, network, data = experiment.config, experiment.network, experiment.finetune
    evaluate = make_evaluate(network, config)
    pretrained = _pretrain(run, experiment, evaluate)
    starts = {seed: experiment.initial(seed) if pretrained is None else pretrained for seed in config.seeds}
    functions = make_functions(network, config, data, evaluate)
    results: dict[tuple[TB, int], Results] = {}
    for tb in config.settings():
        for seed, params in starts.items():
            stage = Stage(f"{tb}, seed {seed}", tb, seed, config, data, params)
            trained = _train(run / tb / f"seed{seed}", stage, functions, experiment.model)
            # Plots are of the first seed; a large model's parameters times all seeds would fill the memory.
            results[tb, seed] = trained if seed == config.seeds[0] else trained._replace(params=None)
    before = run_test(starts[config.seeds[0]], data.test, config, evaluate)
    summary = summarise(results, before)
    plots = plot_run(run, experiment, results, before)
    write_json(run / "summary.json", {"run": experiment.title(), **summary})
    return table(summary, run, plots)


def _pretrain(run: Path, experiment: Experiment, evaluate: Evaluate) -> Any:
    """Return the pretrained parameters, or `None` if nothing is pretrained."""
    config, model, network, data = experiment.config, experiment.model, experiment.network, experiment.pretrain
    if data is None or not config.pretrain_epochs:
        return None
    pretrain = dataclasses.replace(
        config,
        epochs=config.pretrain_epochs,
        learning_rate=config.pretrain_rate,
        warmup_epochs=config.pretrain_epochs // 5,
        schedule="cycle",
    )
    seed = config.seeds[0]  # one pretraining for all seeds, as if its weights had been downloaded
    stage = Stage("pretrain", "none", seed, pretrain, data, experiment.initial(seed))
    return _train(run / "pretrain", stage, make_functions(network, pretrain, data, evaluate), model).params


def _train(folder: Path, stage: Stage, functions: Functions, model: ModelConfig) -> Results:
    """Train one stage in its folder, and export its weights."""
    directory = SeedDirectory(folder)
    state = train_stage(directory, stage, functions)
    checkpoints.save(folder / "model.safetensors", state.params, model)
    return Results(state.params, directory.metrics(), directory.layers())


def make_functions(network: Network, config: Config, data: FieldData, evaluate: Evaluate) -> Functions:
    """Return the functions that train on `data`; each compiles at its first call."""
    steps = -(-len(data.train) // _batch_size(config, data.train))
    optimizer = make_optimizer(config, steps)
    step, fault = make_step(network, optimizer, config), make_fault(network, config)
    return Functions(step, evaluate, optimizer, steps, fault)


def train_stage(directory: SeedDirectory, stage: Stage, functions: Functions) -> TrainState:
    """Return the state after training from where the directory stands; for its errors see `run_epochs`."""
    config, steps = stage.config, functions.steps_per_epoch
    assert config.epochs is not None
    params = jax.tree.map(jnp.array, stage.params)  # a copy: the step donates it
    at = directory.restore(TrainState(params, functions.optimizer.init(params)))
    rate_at = schedules(config, steps)[0]
    epochs = Epochs(
        name=stage.name,
        count=config.epochs,
        steps=steps,
        sums=_SUMS,
        divisor=len(stage.data.train),
        rate=lambda epoch: float(rate_at(epoch * steps)),
        refresh=make_refresh(config, stage.tb),
        take_steps=functools.partial(_take_steps, stage, functions),
        test=lambda state: run_test(state.params, stage.data.test, config, functions.evaluate),
        score=lambda line: -line["test_l2re"],
        show=lambda bar, line: bar.set_postfix(train=f"{line['train_l2re_step']:.4f}", test=f"{line['test_l2re']:.4f}"),
        advice="a lower --learning-rate (--pretrain-rate in pretraining) or --clip",
    )
    return run_epochs(directory, at, epochs)


def _take_steps(
    stage: Stage, functions: Functions, state: TrainState, epoch: int, first: int, sums: np.ndarray
) -> Generator[StepsTaken]:
    """Train on every trajectory once, from batch `first` of the epoch on."""
    config, key = stage.config, jax.random.fold_in(jax.random.key(stage.seed), epoch)
    drawn = train_batches(
        stage.data.train,
        batch_size=_batch_size(config, stage.data.train),
        steps=config.in_steps + config.rollout_steps,
        seed=stage.seed,
        epoch=epoch,
        first=first,
    )
    with contextlib.closing(drawn):
        batches = map(jax.device_put, drawn)
        batch = next(batches, None)
        while batch is not None:
            inputs = (jax.random.fold_in(key, first), *batch)
            state, measured = functions.step(state, *inputs)
            batch = next(batches, None)  # goes to the device while the step runs
            measured = np.asarray(measured)
            loss, find_fault = float(measured[:2].sum()), None
            if np.isfinite(measured).all():
                first, sums = first + 1, sums + measured[:2]
            else:
                find_fault = functools.partial(functions.fault, state.params, *inputs)
            yield StepsTaken(state, first, sums, loss, find_fault)


def run_test(params: Any, fields: Fields, config: Config, evaluate: Evaluate) -> dict[str, Any]:
    """Return L2RE, means over the test trajectories: of the whole rollout, by step (a list), and the mean of its steps.

    Every point of the model's grid counts. DPOT's code leaves out points that it interpolated between stored ones;
    at the resolution of the data, as in the paper, there are none.
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
    """Return the trajectories per step: no more than the data have, as the rest would be padding."""
    assert config.batch_size is not None
    return min(config.batch_size, len(fields))


@functools.cache  # compiled once for all stages of a run
def _scale_of(low: float, high: float, slope: float) -> Callable[..., Any]:
    sigmoid = functools.partial(farms_jax.mappings.sigmoid, slope=slope)
    return jax.jit(functools.partial(farms_jax.lr_scale, low=low, high=high, mapping=sigmoid, follow=FOLLOW))


def make_refresh(config: Config, tb: TB) -> Callable[[TrainState], Refreshed]:
    """Return the function that measures the layers and sets their rates; with "none" it leaves the rates alone."""
    scale_of = _scale_of(*config.bounds(), config.slope)

    def refresh(state: TrainState) -> Refreshed:
        report = measure(state.params, config, tb)
        scale = jax.tree.map(lambda _: jnp.ones((), jnp.float32), state.params)
        if tb != "none":
            # An end with too few eigenvalues is not in the report in the first place.
            ends = [name for name in ENDS if config.layer_selection and name in report.names]
            scale = scale_of(report.drop(ends), state.params)
        state = state._replace(opt_state=farms_jax.refresh(state.opt_state, scale))
        # Arrays that were never put on a device by name would have the step compiled anew after its first call.
        return Refreshed(jax.device_put(state, jax.devices()[0]), report, scale)

    return refresh
