"""A run: dense perplexity, allocation, pruning block by block, perplexity of what was written, card and plots.

Every stage is recorded when it is finished. A run that was stopped begins its unfinished stage again; pruning goes on
with the first block that is not written, after the calibration text was taken through those that are.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import write_json
from farms_jax.programs.memory import peak_memory

from .allocation import epsilons, plan_of, shapes_of, sizes_of, sparsities
from .blocks import Plan
from .checkpoints import Checkpoint, open_checkpoint
from .job import Job, epsilon_of
from .output import Output
from .passes import analyse, lay_out, score, simulate, write
from .perplexity import perplexity
from .plots import plot_run
from .rundir import RunDirectory, opened
from .summary import Row, allocation_table, layer_rows, make_card, summarise


def run(job: Job) -> str:
    """Carry out a job, from where an earlier run of the same command stopped.

    Args:
        job: what to do.

    Returns:
        Tables of what was found, and where it is.

    Raises:
        InputError: something given turned out not to be usable, the disk is full, or another process is at the same
            run; what is done is kept.
    """
    config = job.config
    # A dry run prunes nothing, and so must not take away what was pruned.
    with opened(job.path, fresh=config.fresh and not config.dry_run) as directory:
        if (directory.path / "run.json").exists() and not config.dry_run:
            tqdm.write(f"this run is finished, these are its results; --fresh does it again: {directory.path}")
        else:
            tqdm.write(f"{job.checkpoint.name}, {config.method}, {config.allocation} -> {directory.path}")
        try:
            return Experiment(job, directory).run()
        except ValueError as error:  # of the core: an analysis or an allocation that cannot be made
            raise error if isinstance(error, InputError) else InputError(str(error)) from error
        except OSError as error:  # of a cache, a card or a plot; a model's own errors say more
            remedy = "free space, or name another --out; the same command goes on from there"
            raise InputError(f"{error.filename or directory.path}: {error.strerror or error}; {remedy}") from error


class Experiment:
    """The stages of one run; `run` is their order."""

    def __init__(self, job: Job, directory: RunDirectory) -> None:
        """Begin a run, or go on with one.

        Args:
            job: what to do.
            directory: where its stages are recorded.
        """
        self.job, self.config, self.network, self.directory = job, job.config, job.network, directory
        self.shapes, self.sizes = shapes_of(job.network), sizes_of(job.network)
        self._computed = False

    def run(self) -> str:
        """Go through all stages.

        Returns:
            What was found, as tables, and where it is.
        """
        # Before any long work, so that a full disk is known at once.
        output = None if self.config.dry_run else lay_out(self.job, self.directory)
        dense = self._stage("dense", lambda: self._evaluate("dense perplexity", self.job.checkpoint))
        alphas = self._stage("alphas", lambda: analyse(self.job, self.job.checkpoint, "alphas"))
        scores = self._stage("scores", lambda: score(self.job, alphas))
        epsilon = self._stage("epsilon", lambda: self._epsilon(scores))
        sparsity = self._stage("sparsity", lambda: sparsities(self.config, scores, self.sizes, epsilon["value"]))
        plan = plan_of(self.config, sparsity, self.shapes)
        table = allocation_table(self.job, scores, epsilon["value"], plan, self.sizes)
        if self.config.dry_run:
            return table
        tqdm.write(table)
        uniform = self._stage("uniform", self._uniform) if self.config.baseline == "uniform" else None
        blocks = self._stage("blocks", lambda: self._prune(plan, output))
        written = open_checkpoint(str(self.directory.path / "model"))
        pruned = self._stage("pruned", lambda: self._evaluate("pruned perplexity", written))
        after = self._stage("alphas after", lambda: analyse(self.job, written, "alphas after pruning"))
        rows = layer_rows(self.sizes, scores, alphas, after, plan, blocks)
        plots = plot_run(self.directory.path, rows, f"{self.job.checkpoint.name}, {self.config.method}")
        results = {"dense": dense, "uniform": uniform, "pruned": pruned, "epsilon": epsilon, "blocks": blocks}
        self.directory.write_layers(rows)
        return summarise(self._card(rows, results), self.directory.path, plots)

    def _stage(self, name: str, compute: Callable[[], Any]) -> Any:
        if self.directory.get(name) is None:
            start, self._computed = time.perf_counter(), True
            result = compute()
            seconds = self.directory.get("seconds", {})
            self.directory.put("seconds", {**seconds, name: time.perf_counter() - start})
            self.directory.put("peak_memory_bytes", self._peak())
            self.directory.put(name, result)  # last: a stage that is recorded has all that the card says of it
        return self.directory.get(name)

    def _card(self, rows: Sequence[Row], results: Mapping[str, Any]) -> dict[str, Any]:
        """The card; where nothing was left to do, the one on record, with the versions that the numbers are of."""
        if self._computed or self.directory.get("card") is None:
            card = make_card(self.job, rows, results, self.directory.get("seconds"), self._peak())
            self.directory.put("card", card)
        write_json(self.directory.path / "run.json", self.directory.get("card"))
        return self.directory.get("card")

    def _peak(self) -> int:
        """Most memory over all the processes that worked on the run."""
        return max(peak_memory(), self.directory.get("peak_memory_bytes", 0))

    def _evaluate(self, title: str, checkpoint: Checkpoint) -> dict[str, Any]:
        ids, spill = self.job.evaluation.ids, self.config.spill
        found = perplexity(self.network, checkpoint, ids, spill=spill, title=title)
        return {"perplexity": found.value, "seconds": found.seconds, "nll": found.nll.tolist()}

    def _epsilon(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """Half the range of sparsities; searched on calibration text that no statistic has seen."""
        given = epsilon_of(self.config)
        if given is not None:
            return {"value": given}
        trials = dict(self.directory.get("trials", {}))
        for epsilon in epsilons(self.config.allocation):
            if str(epsilon) not in trials:
                plan = plan_of(self.config, sparsities(self.config, scores, self.sizes, epsilon), self.shapes)
                found = simulate(self.job, plan, self.job.unseen, f"epsilon {epsilon}")
                trials[str(epsilon)] = found["perplexity"]
                self.directory.put("trials", trials)
        best = min(trials, key=lambda epsilon: (math.isnan(trials[epsilon]), trials[epsilon]))
        tqdm.write("held-out perplexity by epsilon: " + ", ".join(f"{k}: {v:.4g}" for k, v in trials.items()))
        return {"value": float(best), "trials": trials}

    def _prune(self, plan: Plan, output: Output | None) -> list[dict[str, Any]]:
        if output is None:  # stopped between the last block and this stage's record
            return self.directory.get("written")
        return write(self.job, plan, self.directory, output)

    def _uniform(self) -> dict[str, Any]:
        config = dataclasses.replace(self.config, allocation="uniform")
        plan = plan_of(config, sparsities(config, {}, self.sizes, 0.0), self.shapes)
        return simulate(self.job, plan, self.job.evaluation.ids, "prune uniformly")
