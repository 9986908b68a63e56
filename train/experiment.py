"""A run: one network per seed, from a seed or its last checkpoint to the plots."""

import functools
import time
from collections.abc import Callable
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
from farms_jax.programs.files import write_json
from farms_jax.programs.finite import not_finite
from farms_jax.programs.rundir import Progress, RunError, SeedDirectory, environment, layer_rows
from farms_jax.programs.stopping import StopRequest, hold_stops

from .config import Config
from .data import Images
from .loop import (
    Network,
    Normalise,
    Steps,
    TrainState,
    cosine_rate,
    make_evaluate,
    make_fault,
    make_network,
    make_optimizer,
    make_steps,
)
from .models import MODELS
from .parallel import make_mesh, on_all, spread_over
from .plots import plot_run

Refresh = Callable[[TrainState, int], tuple[TrainState, list[dict[str, Any]], float]]
SUMS = ("train_loss", "train_accuracy")  # of `Piece.sums`
_PIECE_SECONDS = 5.0  # a stop is seen after so long


def facts(images: Images) -> dict[str, Any]:
    """What a run's numbers depend on besides its settings: data, versions, machine."""
    return {
        "dataset": _argument(images.name),
        "data": images.name,
        "fingerprint": images.fingerprint,
        **environment(),
    }


def _argument(name: str) -> str:
    return "digits" if name.startswith("digits") else name


def check_same_data(images: Images, before: dict[str, Any]) -> None:
    """Refuse to go on with other data.

    Raises:
        RunError: the fingerprint of the images is not that of the run.
    """
    if images.fingerprint != before["fingerprint"]:
        raise RunError(
            f"--resume: {images.name} is not the data that the run began with; put those back, or start anew"
        )


class Functions(NamedTuple):
    """Compiled functions of a run, shared by its seeds."""

    network: Network
    optimizer: Any
    steps: Steps
    fault: Callable[..., str]
    evaluate: Callable[..., dict[str, Array]]
    refresh: Refresh
    mesh: Mesh | None


def make_functions(config: Config, images: Images) -> Functions:
    """Make the functions that train on the images; each compiles at its first call.

    Args:
        config: resolved.
        images: the data.

    Returns:
        The functions.

    Raises:
        InputError: the images do not fill one batch, or the batches not the devices.
    """
    assert config.batch_size is not None
    network, optimizer = make_network(config, images.num_classes), make_optimizer(config, _steps(config, images))
    normalise = Normalise(jnp.asarray(images.mean), jnp.asarray(images.std))
    mesh = make_mesh(config.devices, config.batch_size)
    spread = spread_over(mesh)
    steps, fault = make_steps(network, optimizer, normalise, config, spread), make_fault(network, normalise, config)
    evaluate, refresh = make_evaluate(network, normalise, spread), make_refresh(config)
    return Functions(network, optimizer, steps, fault, evaluate, refresh, mesh)


def _steps(config: Config, images: Images) -> int:
    """Return the steps of an epoch."""
    assert config.batch_size is not None
    if len(images.train_labels) < config.batch_size:
        raise RunError(f"--batch-size {config.batch_size} is more than the {len(images.train_labels)} training images")
    return len(images.train_labels) // config.batch_size


def train_run(run: Path, config: Config, images: Images) -> str:
    """Train all seeds, write the summary and the plots.

    Args:
        run: directory, with `config.json` written.
        config: resolved.
        images: the data.

    Returns:
        A table of the results, and where they are.

    Raises:
        InputError: the images do not fill one batch, or a loss is not finite.
    """
    functions = make_functions(config, images)
    for line in filter(None, (images.notice, f"{_title(config, images)} -> {run}")):
        tqdm.write(line)
    seeds = {}
    for seed in config.seeds:
        with SeedDirectory(run / f"seed{seed}") as directory:
            train_seed(directory, seed, config, images, functions)
            seeds[seed] = (directory.metrics(), directory.layers())
    plots = plot_run(run, seeds, _title(config, images))
    summary = summarise({seed: metrics for seed, (metrics, _) in seeds.items()})
    write_json(run / "summary.json", {"data": images.name, "model": config.model, "tb": config.tb, **summary})
    return _table(summary, images, run, plots)


def _title(config: Config, images: Images) -> str:
    selection = " + LS" if config.layer_selection and config.tb != "none" else ""
    return f"{config.model} x{config.width} on {images.name}, tb={config.tb}{selection}, {config.epochs} epochs"


class _Seed(NamedTuple):
    """One network's training: its files, what it runs on and with.

    Attributes:
        number: of parameters, order and augmentation.
        directory: of the seed.
        functions: of `make_functions`.
        train: images and labels.
        test: images and labels.
        steps: of an epoch.
        key: of all epochs.
    """

    number: int
    directory: SeedDirectory
    functions: Functions
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    steps: int
    key: Array


def train_seed(
    directory: SeedDirectory, number: int, config: Config, images: Images, functions: Functions
) -> TrainState:
    """Train one network, from where its directory stands; a stop leaves a checkpoint of the step where it came.

    Args:
        directory: of the seed.
        number: the seed, of parameters, order and augmentation.
        config: resolved.
        images: the data.
        functions: of `make_functions`.

    Returns:
        The final state.

    Raises:
        InputError: a loss or a gradient is not finite; the state before that step is the last checkpoint then.
        Stopped: by Ctrl-C or SIGTERM.
    """
    assert config.epochs is not None
    init_key, run_key = jax.random.split(jax.random.key(number))
    params, stats = jax.jit(functions.network.init)(init_key)
    at = directory.restore(TrainState(params, stats, functions.optimizer.init(params)))
    at = at._replace(state=on_all(functions.mesh, at.state))
    train = on_all(functions.mesh, (jnp.asarray(images.train_images), jnp.asarray(images.train_labels)))
    test = on_all(functions.mesh, (jnp.asarray(images.test_images), jnp.asarray(images.test_labels)))
    seed = _Seed(number, directory, functions, train, test, _steps(config, images), run_key)
    best = max((line["test_accuracy"] for line in directory.metrics()), default=-1.0)
    total = config.epochs * seed.steps
    bar = tqdm(total=total, initial=at.done, desc=f"seed {number}", unit="step", dynamic_ncols=True)
    with bar, hold_stops() as stop:
        for epoch in range(at.done // seed.steps, config.epochs):
            at = _run_steps(seed, at if at.so_far else _refresh(seed, at, epoch), stop, bar)
            line = {"epoch": epoch, "learning_rate": cosine_rate(config, epoch), **_measure(seed, at)}
            directory.append_metrics(line)
            if line["test_accuracy"] > best:
                best = line["test_accuracy"]
                directory.save_best(at.state, at.done)
            at = Progress(at.state, at.done, {})
            directory.save(*at)
            bar.set_postfix(loss=f"{line['train_loss']:.3f}", test=f"{100 * line['test_accuracy']:.2f} %")
            tqdm.write(_line(line, config.epochs))
            stop.obey()
    directory.append_layers(functions.refresh(at.state, config.epochs)[1])
    return at.state


def _refresh(seed: _Seed, at: Progress, epoch: int) -> Progress:
    """Measure the layers and set their rates, at the start of an epoch."""
    state, layers, seconds = seed.functions.refresh(at.state, epoch)
    seed.directory.append_layers(layers)
    return Progress(state, at.done, dict.fromkeys(SUMS, 0.0) | {"seconds": seconds, "refresh_seconds": seconds})


def _run_steps(seed: _Seed, at: Progress, stop: StopRequest, bar: tqdm) -> Progress:
    """Take the steps that are left of an epoch, a few seconds' worth at a time."""
    first, count = at.done % seed.steps, 1
    epoch = at.done // seed.steps
    key = jax.random.fold_in(seed.key, epoch)
    while first < seed.steps:
        start = time.perf_counter()
        sums = np.array([at.so_far[name] for name in SUMS], np.float32)
        piece = seed.functions.steps(at.state, sums, key, first, min(first + count, seed.steps), *seed.train)
        first = int(piece.step)
        seconds = time.perf_counter() - start
        so_far = {**at.so_far, **dict(zip(SUMS, map(float, piece.sums), strict=True))}
        at = Progress(piece.state, epoch * seed.steps + first, {**so_far, "seconds": so_far["seconds"] + seconds})
        bar.update(at.done - bar.n)
        if not piece.is_finite:
            raise _not_finite(seed, at, key, float(piece.loss))
        if stop and first < seed.steps:  # after the last one the test and the epoch's lines come first
            seed.directory.save(*at)
            stop.obey()
        # The first call compiles, so that it says little of a step's time.
        count = max(1, min(2 * count, int(count * _PIECE_SECONDS / seconds)))
    return at


def _not_finite(seed: _Seed, at: Progress, key: Array, loss: float) -> InputError:
    """Keep the state before the step, and find out what went wrong in it."""
    epoch, step = divmod(at.done, seed.steps)
    return not_finite(
        f"seed {seed.number}",
        (epoch + 1, step + 1),
        at.done + 1,
        loss=loss,
        kept=seed.directory.save(*at),
        first=seed.functions.fault(at.state, key, step, *seed.train),
        advice="a lower --learning-rate",
    )


def _measure(seed: _Seed, at: Progress) -> dict[str, float]:
    """What `metrics.jsonl` says of a finished epoch, its test included."""
    start = time.perf_counter()
    tested = {name: float(value) for name, value in seed.functions.evaluate(at.state, *seed.test).items()}
    seconds = at.so_far["seconds"] + time.perf_counter() - start
    trained = {name: at.so_far[name] / seed.steps for name in SUMS}
    return {**trained, **tested, "seconds": seconds, "refresh_seconds": at.so_far["refresh_seconds"]}


def _line(line: dict[str, Any], epochs: int) -> str:
    share = 100 * line["refresh_seconds"] / line["seconds"]
    return (
        f"epoch {line['epoch'] + 1:3d}/{epochs}  loss {line['train_loss']:.3f}  "
        f"train {100 * line['train_accuracy']:5.2f} %  test {100 * line['test_accuracy']:5.2f} %  "
        f"rate {line['learning_rate']:.4f}  {line['seconds']:.1f} s, refresh {line['refresh_seconds']:.2f} s "
        f"({share:.1f} %)"
    )


def make_refresh(config: Config) -> Refresh:
    """Make the function that measures the layers and sets their rates, at the start of an epoch.

    Args:
        config: resolved.

    Returns:
        `refresh(state, epoch) -> (state, rows of layers.csv, seconds)`. Without TempBalance the layers are
        measured and the rates left alone.
    """
    model = MODELS[config.model]
    follow = {"name": model.follow, "order": model.follow_order, "none": None}[config.norms]
    scale_of = jax.jit(
        functools.partial(
            farms_jax.lr_scale, low=config.low or 1.0, high=config.high or 1.0, mapping=config.mapping, follow=follow
        )
    )

    def refresh(state: TrainState, epoch: int) -> tuple[TrainState, list[dict[str, Any]], float]:
        start = time.perf_counter()
        report = farms_jax.analyze(state.params, window=config.window_of_run(), tail=config.tail())
        scale = jax.tree.map(lambda _: jnp.ones((), jnp.float32), state.params)
        if config.tb != "none":
            balanced = report.drop(model.exclude) if config.layer_selection else report
            scale = scale_of(balanced, state.params)
        opt_state = farms_jax.refresh(state.opt_state, scale)
        jax.block_until_ready(opt_state)
        seconds = time.perf_counter() - start
        return (
            state._replace(opt_state=opt_state),
            layer_rows(report, scale, cosine_rate(config, epoch), epoch),
            seconds,
        )

    return refresh


def summarise(metrics: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Last and best test accuracy of each seed, in per cent, with mean and standard deviation.

    Args:
        metrics: per seed the lines of its `metrics.jsonl`.

    Returns:
        `seeds`, and `mean` and `std` (of the sample, 0 for one seed) of the last and the best accuracy.
    """
    seeds = {
        seed: {
            "last": 100 * lines[-1]["test_accuracy"],
            "best": 100 * max(line["test_accuracy"] for line in lines),
            "seconds": sum(line["seconds"] for line in lines),
            "refresh_seconds": sum(line["refresh_seconds"] for line in lines),
        }
        for seed, lines in metrics.items()
    }
    summary: dict[str, Any] = {"seeds": seeds}
    for which in ("last", "best"):
        values = np.array([row[which] for row in seeds.values()])
        summary[which] = {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
    return summary


def _table(summary: dict[str, Any], images: Images, run: Path, plots: list[Path]) -> str:
    lines = [f"\ntest accuracy on {images.name} (%)", f"{'seed':>6} {'last':>8} {'best':>8} {'time':>9} {'refresh':>9}"]
    for seed, row in summary["seeds"].items():
        times = f"{row['seconds']:7.1f} s {row['refresh_seconds']:7.1f} s"
        lines.append(f"{seed:>6} {row['last']:8.2f} {row['best']:8.2f} {times}")
    if len(summary["seeds"]) > 1:
        for name in ("mean", "std"):
            lines.append(f"{name:>6} {summary['last'][name]:8.2f} {summary['best'][name]:8.2f}")
    names = ", ".join(path.name for path in plots)
    return "\n".join([*lines, f"run: {run}", f"plots: {names}"])
