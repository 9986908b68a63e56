"""A run: one network per seed, from a seed or its last checkpoint to the plots."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import farms_jax
from farms_jax.files import write_json
from farms_jax.rundir import RunError, SeedDirectory, environment, layer_rows
from train.config import Config
from train.data import Images
from train.loop import (
    Normalise,
    TrainState,
    cosine_rate,
    make_epoch,
    make_evaluate,
    make_network,
    make_optimizer,
)
from train.models import MODELS
from train.plots import plot_run

Refresh = Callable[[TrainState, int], tuple[TrainState, list[dict[str, Any]], float]]


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


def train_run(run: Path, config: Config, images: Images) -> str:
    """Train all seeds, write the summary and the plots.

    Args:
        run: directory, with `config.json` written.
        config: resolved.
        images: the data.

    Returns:
        A table of the results, and where they are.

    Raises:
        RunError: the images do not fill one batch.
    """
    assert config.batch_size is not None
    if len(images.train_labels) < config.batch_size:
        raise RunError(f"--batch-size {config.batch_size} is more than the {len(images.train_labels)} training images")
    for line in filter(None, (images.notice, f"{_title(config, images)} -> {run}")):
        tqdm.write(line)
    seeds = {}
    for seed in config.seeds:
        with SeedDirectory(run / f"seed{seed}") as directory:
            train_seed(directory, seed, config, images)
            seeds[seed] = (directory.metrics(), directory.layers())
    plots = plot_run(run, seeds, _title(config, images))
    summary = summarise({seed: metrics for seed, (metrics, _) in seeds.items()})
    write_json(run / "summary.json", {"data": images.name, "model": config.model, "tb": config.tb, **summary})
    return _table(summary, images, run, plots)


def _title(config: Config, images: Images) -> str:
    selection = " + LS" if config.layer_selection and config.tb != "none" else ""
    return f"{config.model} x{config.width} on {images.name}, tb={config.tb}{selection}, {config.epochs} epochs"


def train_seed(directory: SeedDirectory, seed: int, config: Config, images: Images) -> TrainState:
    """Train one network, from where its directory stands.

    Args:
        directory: of the seed.
        seed: of parameters, order and augmentation.
        config: resolved.
        images: the data.

    Returns:
        The final state.
    """
    assert config.batch_size is not None and config.epochs is not None
    network = make_network(config, images.num_classes)
    optimizer = make_optimizer(config, len(images.train_labels) // config.batch_size)
    normalise = Normalise(jnp.asarray(images.mean), jnp.asarray(images.std))
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params, stats = jax.jit(network.init)(init_key)
    state, done = directory.restore(TrainState(params, stats, optimizer.init(params)))
    train = jnp.asarray(images.train_images), jnp.asarray(images.train_labels)
    test = jnp.asarray(images.test_images), jnp.asarray(images.test_labels)
    run_epoch, evaluate = make_epoch(network, optimizer, normalise, config), make_evaluate(network, normalise)
    refresh = make_refresh(config)
    best = max((line["test_accuracy"] for line in directory.metrics()), default=-1.0)
    with tqdm(total=config.epochs, initial=done, desc=f"seed {seed}", unit="epoch", dynamic_ncols=True) as bar:
        for epoch in range(done, config.epochs):
            start = time.perf_counter()
            state, layers, refresh_seconds = refresh(state, epoch)
            directory.append_layers(layers)
            state, measured = run_epoch(state, jax.random.fold_in(run_key, epoch), *train)
            measured = {key: float(value) for key, value in {**measured, **evaluate(state, *test)}.items()}
            seconds = time.perf_counter() - start
            line = {"epoch": epoch, "learning_rate": cosine_rate(config, epoch), **measured}
            line |= {"seconds": seconds, "refresh_seconds": refresh_seconds}
            directory.append_metrics(line)
            if measured["test_accuracy"] > best:
                best = measured["test_accuracy"]
                directory.save_best(state, epoch + 1)
            directory.save(state, epoch + 1)
            bar.set_postfix(loss=f"{measured['train_loss']:.3f}", test=f"{100 * measured['test_accuracy']:.2f} %")
            bar.update()
            tqdm.write(_line(line, config.epochs))
    directory.append_layers(refresh(state, config.epochs)[1])
    return state


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
