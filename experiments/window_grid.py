"""Perplexity of a pruned model by size and number of windows (paper, section 4.6 and Table 6).

    python -m experiments.window_grid --model FILE.gguf

Every window, AlphaPruning and the uniform allocation prune the same model at one sparsity, with the same calibration
tokens, and are evaluated on the same blocks of text; nothing is written but figures. Finished cells are kept in
`window_grid.cells.json`, and the same command goes on with the others. The default texts are those of the bundled model
and the budget is small: enough to see that nothing breaks, too little to rank neighbours. For more: --samples 128
--length 2048 --calibration c4 --text wikitext2 --seed 0 1 2.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiments import _grid
from experiments._common import Result, figure, label, positive, run
from experiments._grid import Setting
from farms_jax.errors import InputError
from farms_jax.programs.files import write_json
from prune.allocation import plan_of
from prune.config import BUNDLED
from prune.job import Job, prepare
from prune.perplexity import perplexity
from prune.pruning import simulate

_SAME = ("sparsity", "epsilon", "tail", "method", "samples", "length", "limit", "calibration", "text")


def main() -> None:
    """Run the experiment."""
    run("window_grid", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    _grid.options(parser)
    parser.add_argument("--method", default="wanda", choices=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--samples", type=positive, default=8, help="calibration sequences")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a sequence")
    parser.add_argument("--limit", type=positive, default=16, help="sequences to evaluate on")
    parser.add_argument("--calibration", default=str(BUNDLED / "calibration.txt"), help="as of prune.llama")
    parser.add_argument("--text", default=str(BUNDLED / "heldout.txt"), help="as of prune.llama")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of the calibration samples")


def experiment(args: argparse.Namespace) -> Result:
    """Prune and evaluate under every setting.

    Args:
        args: the options.

    Returns:
        Rows: one per cell, a setting with a seed. Summary: by setting mean and deviation of the perplexity over seeds.
        Facts: the `model`, the hash of its `weights`, and the perplexity of the `dense` model.

    Raises:
        InputError: the cells in the folder are of other settings.
    """
    with threadpool_limits(1, user_api="blas"):
        jobs = [prepare(config) for config in _configs(args)]
        first = jobs[0]
        path = args.out / "window_grid.cells.json"
        kept = _read(path, {key: getattr(args, key) for key in _SAME} | {"weights": first.weights})
        if "dense" not in kept:
            kept["dense"] = perplexity(first.network, first.checkpoint, first.evaluation.ids, title="dense").value
        settings = _grid.grid(args, first)
        cells = [(setting, job) for setting in settings for job in jobs]
        for setting, job in tqdm(cells, desc="window_grid", unit="cell"):
            name = f"{setting}; seed {job.config.seed}"
            if name not in kept["cells"]:
                kept["cells"][name] = cell(_grid.under(job, setting), name)
                write_json(path, kept)
    rows = [
        {"setting": str(setting), "rows": setting.rows, "per_axis": setting.per_axis, "seed": job.config.seed}
        | kept["cells"][f"{setting}; seed {job.config.seed}"]
        for setting, job in cells
    ]
    summary = [summarise(str(setting), [row for row in rows if row["setting"] == str(setting)]) for setting in settings]
    facts = {"model": first.checkpoint.name, "weights": first.weights, "dense": kept["dense"]}
    what = f"{first.checkpoint.name}, {args.method}, sparsity {args.sparsity:g}"
    return Result(rows, summary, facts, draw(settings, summary, what, kept["dense"]))


def _configs(args: argparse.Namespace) -> list[Any]:
    texts = {key: getattr(args, key) for key in ("method", "samples", "length", "limit", "calibration", "text")}
    return [dataclasses.replace(_grid.config_of(args), seed=seed, **texts) for seed in args.seed]


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the cells that are done, of the same settings."""
    if not path.is_file():
        return {"settings": settings, "cells": {}}
    kept = _grid.read_json(path)
    changed = [key for key, value in settings.items() if kept["settings"].get(key) != value]
    if changed:
        raise InputError(
            f"{path}: its cells are of another {', '.join(changed)}; name another --out, or remove the file"
        )
    return kept


def cell(job: Job, title: str) -> dict[str, float]:
    """Prune and evaluate under the job's allocation.

    Args:
        job: what to prune, and how.
        title: of the progress bar.

    Returns:
        The `perplexity`, and the `sparsity` reached.
    """
    plan = plan_of(job.config, _grid.allocate(job), job.network.layer_shapes())
    found = simulate(job, plan, job.evaluation.ids, title)
    return {"perplexity": found.perplexity, "sparsity": found.sparsity}


def summarise(setting: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and deviation of the perplexity over the seeds of a setting."""
    values = [row["perplexity"] for row in rows]
    return {"setting": setting, "perplexity": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def draw(settings: list[Setting], summary: list[dict[str, Any]], what: str, dense: float) -> Figure:
    """Draw the table, coloured by how much better or worse a window is than AlphaPruning."""
    found = {setting: row["perplexity"] for setting, row in zip(settings, summary, strict=True)}
    windows = [setting for setting in settings if setting.rows and setting.per_axis]
    rows = list(dict.fromkeys(setting.rows for setting in windows))
    counts = list(dict.fromkeys(setting.per_axis for setting in windows))
    values = np.array([[found[Setting("farms", size, count)] for count in counts] for size in rows])
    baseline = found[Setting("alphapruning")]
    change = 100 * (values / baseline - 1)
    drawing, (axis,) = figure(1.6 + 1.25 * len(counts) + 1.2, 1.5 + 0.55 * len(rows))
    limit = max(float(np.abs(change).max()), 1e-9)
    image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = abs(change[row, column]) > 0.65 * limit
        axis.text(column, row, f"{value:.4g}", ha="center", va="center", fontsize=9.5, color="w" if dark else "k")
    axis.grid(visible=False)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_yticks(range(len(rows)), [str(size) for size in rows])
    drawing.colorbar(image, ax=axis, label="against AlphaPruning (%)")
    baselines = f"AlphaPruning {baseline:.4g}, uniform {found[Setting('uniform')]:.4g}, dense {dense:.4g}"
    label(axis, f"{what}: perplexity\n{baselines}", "window positions on each axis", "rows of a window")
    return drawing


if __name__ == "__main__":
    main()
