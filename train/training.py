"""A run: one network per seed, from a seed or its last checkpoint to the table and the plots."""

import functools
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

import farms_jax
from farms_jax.errors import InputError
from farms_jax.programs.environment import environment
from farms_jax.programs.epoch_loop import Epochs, Refreshed, StepsTaken, run_epochs
from farms_jax.programs.files import write_json
from farms_jax.programs.run_directory import SeedDirectory

from .config import Config
from .data import Images
from .models import MODELS
from .parallel import make_mesh, on_all
from .results import plot_run, summarise, table
from .steps import (
    Network,
    Normalise,
    Piece,
    TrainState,
    cosine_rate,
    make_evaluate,
    make_fault,
    make_network,
    make_optimizer,
    make_steps,
)

_SUMS = ("train_loss", "train_accuracy")  # names of `Piece.sums`
_PIECE_SECONDS = 5.0  # the longest that a stop waits for the steps of one call


def facts(images: Images) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its settings: data, versions, machine."""
    return {
        "dataset": "digits" if images.name.startswith("digits") else images.name,
        "data": images.name,
        "fingerprint": images.fingerprint,
        **environment(),
    }


def check_same_data(images: Images, before: dict[str, Any]) -> None:
    """Raise an InputError if the images are not those of the run whose facts are given."""
    if images.fingerprint != before["fingerprint"]:
        raise InputError(
            f"--resume: {images.name} is not the data that the run began with; put those back, or start anew"
        )


def train_run(run: Path, config: Config, images: Images) -> str:
    """Return a table of the results of all seeds; they, a summary and plots are written to the run directory."""
    functions = make_functions(config, images)
    selection = " + LS" if config.layer_selection and config.tb != "none" else ""
    title = f"{config.model} x{config.width} on {images.name}, tb={config.tb}{selection}, {config.epochs} epochs"
    for line in filter(None, (images.notice, f"{title} -> {run}")):
        tqdm.write(line)
    metrics, layers = {}, {}
    for seed in config.seeds:
        directory = SeedDirectory(run / f"seed{seed}")
        train_seed(directory, seed, config, images, functions)
        metrics[seed], layers[seed] = directory.metrics(), directory.layers()
    plots = plot_run(run, metrics, layers, title)
    summary = summarise(metrics)
    write_json(run / "summary.json", {"data": images.name, "model": config.model, "tb": config.tb, **summary})
    return table(summary, images.name, run, plots)


class Functions(NamedTuple):
    """Compiled functions of a run, shared by its seeds; each is documented where it is made."""

    network: Network
    optimizer: Any
    steps: Callable[..., Piece]
    fault: Callable[..., str]
    evaluate: Callable[..., dict[str, Array]]
    refresh: Callable[[TrainState], Refreshed]
    steps_per_epoch: int
    mesh: Mesh | None


def make_functions(config: Config, images: Images) -> Functions:
    """Return the functions that train on the images, which have to fill a batch; each compiles at its first call."""
    assert config.batch_size is not None
    count = len(images.train_labels)
    if count < config.batch_size:
        raise InputError(f"--batch-size {config.batch_size} is more than the {count} training images")
    steps_per_epoch = count // config.batch_size
    network, optimizer = make_network(config, images.num_classes), make_optimizer(config, steps_per_epoch)
    normalise = Normalise(*map(jnp.asarray, images.mean_and_std))
    mesh = make_mesh(config.devices, config.batch_size)
    return Functions(
        network=network,
        optimizer=optimizer,
        steps=make_steps(network, optimizer, normalise, config, mesh),
        fault=make_fault(network, normalise, config),
        evaluate=make_evaluate(network, normalise, mesh),
        refresh=make_refresh(config),
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
    )


def make_refresh(config: Config) -> Callable[[TrainState], Refreshed]:
    """Return `refresh(state)`, which measures the layers and sets their rates; without TempBalance it only measures."""
    model = MODELS[config.model]
    follow = {"name": model.follow, "order": model.follow_order, "none": None}[config.norms]
    rates = {"low": config.low or 1.0, "high": config.high or 1.0, "mapping": config.mapping, "follow": follow}
    scale_of = jax.jit(functools.partial(farms_jax.lr_scale, **rates))

    def refresh(state: TrainState) -> Refreshed:
        report = farms_jax.analyze(
            state.params, window=config.window_of_run(), tail=farms_jax.Tail(config.tail, flat=None)
        )
        scale = jax.tree.map(lambda _: jnp.ones((), jnp.float32), state.params)
        if config.tb != "none":
            balanced = report.drop(model.exclude) if config.layer_selection else report
            scale = scale_of(balanced, state.params)
        return Refreshed(state._replace(opt_state=farms_jax.refresh(state.opt_state, scale)), report, scale)

    return refresh


def train_seed(directory: SeedDirectory, seed: int, config: Config, images: Images, functions: Functions) -> TrainState:
    """Return the final state of one network, trained from where its directory stands; see `run_epochs`."""
    assert config.epochs is not None
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params, stats = jax.jit(functions.network.init)(init_key)
    at = directory.restore(TrainState(params, stats, functions.optimizer.init(params)))
    at = at._replace(state=on_all(functions.mesh, at.state))
    train = on_all(functions.mesh, (jnp.asarray(images.train_images), jnp.asarray(images.train_labels)))
    test = on_all(functions.mesh, (jnp.asarray(images.test_images), jnp.asarray(images.test_labels)))
    epochs = Epochs(
        name=f"seed {seed}",
        count=config.epochs,
        steps=functions.steps_per_epoch,
        sums=_SUMS,
        divisor=functions.steps_per_epoch,
        rate=lambda epoch: float(cosine_rate(config, epoch)),
        refresh=functions.refresh,
        take_steps=functools.partial(_take_steps, functions, run_key, train),
        test=lambda state: {name: float(value) for name, value in functions.evaluate(state, *test).items()},
        score=lambda line: line["test_accuracy"],
        show=functools.partial(_show, config.epochs),
        advice="a lower --learning-rate",
    )
    return run_epochs(directory, at, epochs)


def _take_steps(
    functions: Functions,
    run_key: Array,
    train: tuple[Array, Array],
    state: TrainState,
    epoch: int,
    first: int,
    sums: np.ndarray,
) -> Generator[StepsTaken]:
    """Take the steps of an epoch from number `first` on, a few seconds' worth in each call."""
    key, count = jax.random.fold_in(run_key, epoch), 1
    while first < functions.steps_per_epoch:
        start = time.perf_counter()
        last = min(first + count, functions.steps_per_epoch)
        piece = functions.steps(state, sums, key, first, last, *train)
        state, sums, first = piece.state, np.array(piece.sums), int(piece.step)
        seconds = time.perf_counter() - start
        find_fault = None if piece.is_finite else functools.partial(functions.fault, state, key, first, *train)
        yield StepsTaken(state, first, sums, float(piece.loss), find_fault)
        # The first call compiles, so that it says little of a step's time.
        count = max(1, min(2 * count, int(count * _PIECE_SECONDS / seconds)))


def _show(epochs: int, bar: tqdm, line: dict[str, Any]) -> None:
    """Show the line of an epoch at the progress bar, and print it above."""
    bar.set_postfix(loss=f"{line['train_loss']:.3f}", test=f"{100 * line['test_accuracy']:.2f} %")
    share = 100 * line["refresh_seconds"] / line["seconds"]
    tqdm.write(
        f"epoch {line['epoch'] + 1:3d}/{epochs}  loss {line['train_loss']:.3f}  "
        f"train {100 * line['train_accuracy']:5.2f} %  test {100 * line['test_accuracy']:5.2f} %  "
        f"rate {line['learning_rate']:.4f}  {line['seconds']:.1f} s, refresh {line['refresh_seconds']:.2f} s "
        f"({share:.1f} %)"
    )
