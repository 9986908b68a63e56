"""The epoch loop of a training: refresh the rates, take the steps, test, write the line, checkpoint, stop if asked.

A program gives the loop its own pieces as an `Epochs`; the loop owns the order of events and the run directory, so that
a stop or a loss that is not finite leaves a checkpoint from which the training resumes with the same bits.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from farms_jax._names import named_leaves
from farms_jax._report import LayerReport
from farms_jax.errors import InputError
from farms_jax.programs.checkpoints import Progress
from farms_jax.programs.run_directory import SeedDirectory
from farms_jax.programs.stopping import StopRequest, hold_stops


class Refreshed(NamedTuple):
    """Outcome of a refresh."""

    state: Any  # of the training, with the new rates
    report: LayerReport
    scale: Any  # factors of the rate, a tree like the parameters


class StepsTaken(NamedTuple):
    """Outcome of one or more steps of an epoch."""

    state: Any  # after the last step that was finite
    step: int  # finished steps of the epoch
    sums: np.ndarray  # float32 (n,): the measures of the steps, summed over the epoch up to here
    loss: float  # of the last step
    find_fault: Callable[[], str] | None  # names what in the last step is not finite; `None` where all is


@dataclasses.dataclass(frozen=True)
class Epochs:
    """A training, as the pieces that differ between programs."""

    name: str  # for the progress bar and errors
    count: int
    steps: int  # of an epoch
    sums: tuple[str, ...]  # names of `StepsTaken.sums`
    divisor: int  # of the sums, for the line of the epoch
    rate: Callable[[int], float]  # epoch -> global learning rate
    refresh: Callable[[Any], Refreshed]  # state -> rates from a new measurement of the layers
    take_steps: Callable[[Any, int, int, np.ndarray], Generator[StepsTaken]]  # (state, epoch, first step, sums)
    test: Callable[[Any], dict[str, Any]]  # state -> measures of the test data
    score: Callable[[dict[str, Any]], float]  # line of metrics.jsonl -> number, highest for the best epoch
    show: Callable[[tqdm, dict[str, Any]], None]  # shows a line at the progress bar
    advice: str  # settings to try where a loss is not finite


def run_epochs(directory: SeedDirectory, at: Progress, epochs: Epochs) -> Any:
    """Return the final state of a training, from where its restored directory stands.

    Every epoch begins with a measurement of the layers, and ends with a test, its lines and a checkpoint.

    Raises:
        InputError: a loss or a gradient is not finite; the state before that step is the last checkpoint then.
        Stopped: by Ctrl-C or SIGTERM; there is a checkpoint of the step where it came.
    """
    best = max((epochs.score(line) for line in directory.metrics()), default=-np.inf)
    bar = tqdm(total=epochs.count * epochs.steps, initial=at.done, desc=epochs.name, unit="step", dynamic_ncols=True)
    with bar, hold_stops() as stop:
        for epoch in range(at.done // epochs.steps, epochs.count):
            if not at.partial_epoch:
                at = _refresh(directory, at, epochs, epoch)
            at = _take_steps(directory, at, epochs, epoch, stop, bar)
            line = {"epoch": epoch, "learning_rate": epochs.rate(epoch), **_measure(at, epochs)}
            directory.append_metrics(line)
            at = Progress(at.state, at.done, {})
            if epochs.score(line) > best:
                best = epochs.score(line)
                directory.save_best(at)
            directory.save(at)
            epochs.show(bar, line)
            stop.obey()
    final = epochs.refresh(at.state)
    directory.append_layers(layer_rows(final.report, final.scale, epochs.rate(epochs.count), epochs.count))
    return at.state


def _refresh(directory: SeedDirectory, at: Progress, epochs: Epochs, epoch: int) -> Progress:
    """Measure the layers and set their rates, at the start of an epoch."""
    start = time.perf_counter()
    state, report, scale = epochs.refresh(at.state)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    directory.append_layers(layer_rows(report, scale, epochs.rate(epoch), epoch))
    sums = dict.fromkeys(epochs.sums, 0.0)
    return Progress(state, at.done, {**sums, "seconds": seconds, "refresh_seconds": seconds})


def _take_steps(
    directory: SeedDirectory, at: Progress, epochs: Epochs, epoch: int, stop: StopRequest, bar: tqdm
) -> Progress:
    """Take the steps that are left of an epoch."""
    start = time.perf_counter() - at.partial_epoch["seconds"]
    sums = np.array([at.partial_epoch[name] for name in epochs.sums], np.float32)
    with contextlib.closing(epochs.take_steps(at.state, epoch, at.done % epochs.steps, sums)) as all_taken:
        for taken in all_taken:
            named = dict(zip(epochs.sums, map(float, taken.sums), strict=True))
            partial_epoch = {**at.partial_epoch, **named, "seconds": time.perf_counter() - start}
            at = Progress(taken.state, epoch * epochs.steps + taken.step, partial_epoch)
            bar.update(at.done - bar.n)
            if taken.find_fault is not None:
                raise _not_finite(directory, at, epochs, taken)
            if stop and taken.step < epochs.steps:  # after the last step the test and the epoch's lines come first
                directory.save(at)
                stop.obey()
    return at


def _measure(at: Progress, epochs: Epochs) -> dict[str, Any]:
    """Return the measures of a finished epoch, tests included, in the order of `metrics.jsonl`."""
    start = time.perf_counter()
    tested = epochs.test(at.state)
    seconds = at.partial_epoch["seconds"] + time.perf_counter() - start
    trained = {name: at.partial_epoch[name] / epochs.divisor for name in epochs.sums}
    return {**trained, **tested, "seconds": seconds, "refresh_seconds": at.partial_epoch["refresh_seconds"]}


def _not_finite(directory: SeedDirectory, at: Progress, epochs: Epochs, taken: StepsTaken) -> InputError:
    """Keep the state before the step, and find out what went wrong in it."""
    assert taken.find_fault is not None
    kept, first = directory.save(at), taken.find_fault()
    epoch, step = divmod(at.done, epochs.steps)
    what = "the gradient is not finite" if np.isfinite(taken.loss) else f"the loss is {taken.loss}"
    return InputError(
        f"{epochs.name}: {what} at step {step + 1} of epoch {epoch + 1} (step {at.done + 1} in all); first not finite: "
        f"{first}; the state before that step is kept in {kept}; --resume takes the step again, and if it ends the "
        f"same, start anew with {epochs.advice}"
    )


def layer_rows(report: LayerReport, scale: Any, rate: float, epoch: int) -> list[dict[str, Any]]:
    """Return the rows of `layers.csv` for one epoch, from the global rate and its factors by layer."""
    factors = dict(named_leaves(scale))
    return [
        {
            "epoch": epoch,
            "layer": name,
            "alpha": float(alpha),
            "lr_scale": float(factors[name]),
            "learning_rate": rate * float(factors[name]),
        }
        for name, alpha in zip(report.names, np.asarray(report.alpha), strict=True)
    ]
