"""A run: dense perplexity, allocation, pruning block by block, perplexity of what was written, card and plots.

Every stage is recorded when it is finished. A run that was stopped begins its unfinished stage again; pruning goes on
with the first block that is not written, after the calibration text has passed through the written ones.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Mapping
from pathlib import Path

from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import write_json

from .allocation import plan_of, sparsities
from .checkpoints import Checkpoint, open_checkpoint
from .config import EPSILONS_SCALE, EPSILONS_SHIFT, SPECTRAL, Allocation
from .forward import NotFiniteError
from .job import Job
from .model_card import write_model_card
from .perplexity import Perplexity, perplexity
from .precision import dtype_names
from .preview import preview
from .pruning import Simulation, judge, simulate
from .publishing import push
from .record import Record, opened
from .results import allocation_table, layer_rows, make_card, perplexity_rows, results_table, write_layers
from .scores import allocate, score_layers, spectral_alphas
from .search import search
from .sparsity_plots import plot_run
from .writing import lay_out, write_pruned, written_blocks


def run(job: Job) -> str:
    """Return tables of the results, and their paths; resume where an earlier run of the same command stopped.

    Raises:
        InputError: an input is unusable, the disk is full, or another process is at the run; finished work stays.
    """
    config = job.config
    with _one_line(config.out):
        if config.dry_run:
            return preview(job)
        with opened(job.path, fresh=config.fresh) as record:
            if (record.path / "run.json").exists():
                tqdm.write(f"this run is finished, these are its results; --fresh does it again: {record.path}")
            else:
                tqdm.write(f"{job.checkpoint.name}, {config.method}, {config.allocation} -> {record.path}")
                tqdm.write(f"written in {dtype_names(job.checkpoint)}: {job.precision.reason}")
            return _run(job, record)


@contextlib.contextmanager
def _one_line(folder: Path) -> Generator[None]:
    try:
        yield
    except ValueError as error:  # from the core: an analysis or an allocation is impossible
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    except OSError as error:  # from a cache, a card or a plot; a model's own errors say more
        remedy = "free space, or name another --out; the same command goes on from there"
        raise InputError(f"{error.filename or folder}: {error.strerror or error}; {remedy}") from error


def _run(job: Job, record: Record) -> str:
    config, shapes = job.config, job.network.layer_shapes()
    # Before any long work, so that a disk without enough space is known at once.
    output = lay_out(job, record)

    dense = record.stage("dense", lambda: _evaluate(job, job.checkpoint, "dense perplexity"), Perplexity)
    alphas = record.stage("alphas", lambda: spectral_alphas(job, job.checkpoint, "alphas"))
    scores = record.stage("scores", lambda: score_layers(job, alphas))
    epsilon = record.stage("epsilon", lambda: find_epsilon(job, scores, record))
    sparsity = record.stage(
        "sparsity",
        lambda: search(job, record) if config.allocation == "search" else sparsities(config, scores, shapes, epsilon),
    )
    plan = plan_of(config, sparsity, shapes)
    tqdm.write(allocation_table(job, scores, epsilon, plan))

    baselines = {
        name: record.stage(name, functools.partial(_simulate_baseline, job, name), Simulation)
        for name in config.baselines()
    }
    record.stage("blocks", lambda: write_pruned(job, plan, record, output))
    blocks = written_blocks(record)

    written = open_checkpoint(str(record.path / "model"))
    pruned = record.stage("pruned", lambda: _evaluate(job, written, "pruned perplexity"), Perplexity)
    alphas_after = record.stage("alphas after", lambda: spectral_alphas(job, written, "alphas after pruning"))

    rows = layer_rows(shapes, plan, scores, alphas, alphas_after, blocks)
    # A card on record stays: it names the package versions that computed its numbers.
    if record.get("card") is None:
        record.put("card", make_card(job, record, rows, blocks, dense, baselines, pruned))
    card = record.get("card")
    plots = plot_run(record.path, rows, perplexity_rows(card), f"{job.checkpoint.name}, {config.method}")
    write_layers(record.path, rows)
    write_json(record.path / "run.json", card)
    write_model_card(record.path / "model", config, card)
    table = results_table(card, record.path, plots)
    if config.push:
        tqdm.write(table)  # first: it stands whatever becomes of the upload
        message = f"{job.checkpoint.name} pruned by {config.method}, {config.allocation}, {config.sparsity:g}"
        return f"pushed: {push(record.path / 'model', config.push, message)}"
    return table


def _evaluate(job: Job, checkpoint: Checkpoint, title: str) -> Perplexity:
    return perplexity(job.network, checkpoint, job.evaluation.ids, spill=job.config.spill, title=title)


def _simulate_baseline(job: Job, allocation: Allocation) -> Simulation:
    """Prune by another allocation, with its default epsilon, and evaluate; nothing is kept."""
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, allocation=allocation))
    plan = plan_of(other.config, allocate(other), job.network.layer_shapes())
    return simulate(other, plan, job.evaluation.ids, f"prune by {allocation}")


def find_epsilon(job: Job, scores: Mapping[str, float], record: Record) -> float:
    """Return half the range of sparsities; `auto` is searched on held-out calibration text, each trial on record."""
    config, shapes = job.config, job.network.layer_shapes()
    given = config.half_range()
    if given is not None:
        return given
    trials = dict(record.get("trials", {}))
    for epsilon in EPSILONS_SCALE if config.allocation in SPECTRAL else EPSILONS_SHIFT:
        if str(epsilon) not in trials:
            trials[str(epsilon)] = judge(job, sparsities(config, scores, shapes, epsilon), f"epsilon {epsilon}")
            record.put("trials", trials)
    finite = {epsilon: value for epsilon, value in trials.items() if value is not None}
    shown = (f"{k}: {'not finite' if v is None else f'{v:.4g}'}" for k, v in trials.items())
    tqdm.write(f"held-out perplexity by epsilon: {', '.join(shown)}")
    if not finite:
        raise NotFiniteError("--epsilon auto: no value gives a finite perplexity")
    return float(min(finite, key=finite.__getitem__))
