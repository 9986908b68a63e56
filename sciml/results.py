"""Results of a run: errors by setting over the seeds, as a summary and a table."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .config import TB


class Results(NamedTuple):
    """Outcome of a stage."""

    params: Any  # final ones; `None` where nobody needs them
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    layers: list[dict[str, Any]]  # rows of layers.csv


def summarise(results: dict[tuple[TB, int], Results], before: dict[str, Any]) -> dict[str, Any]:
    """Return `before`, the errors of the starting weights, and `settings`: seeds and measures of each setting.

    Measures are mean and standard deviation (of the sample, 0 for one seed) of the last and the best L2RE over the
    rollout, of the last mean over its steps, and of the seconds.
    """
    settings = {}
    for tb in dict.fromkeys(tb for tb, _ in results):
        seeds = {seed: _of_seed(result) for (setting, seed), result in results.items() if setting == tb}
        measures = ("last", "best", "last_step", "seconds", "refresh_seconds")
        settings[tb] = {"seeds": seeds, **{key: _spread([row[key] for row in seeds.values()]) for key in measures}}
    return {"before": before, "settings": settings}


def _of_seed(result: Results) -> dict[str, float]:
    lines = result.metrics
    return {
        "last": lines[-1]["test_l2re"],
        "best": min(line["test_l2re"] for line in lines),
        "last_step": lines[-1]["test_l2re_step"],
        "seconds": sum(line["seconds"] for line in lines),
        "refresh_seconds": sum(line["refresh_seconds"] for line in lines),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def table(summary: dict[str, Any], run: Path, plots: list[Path]) -> str:
    """Return the summary as lines for the terminal."""
    before = summary["before"]
    head = f"{'':>14} {'rollout':>22} {'best':>22} {'per step':>22} {'time':>9} {'refresh':>9}"
    lines = ["\nL2RE of the test trajectories, mean and deviation over the seeds", head]
    lines.append(f"{'before':>14} {before['test_l2re']:>22.4e} {'':>22} {before['test_l2re_step']:>22.4e}")
    for tb, row in summary["settings"].items():
        cells = " ".join(f"{_cell(row[key]):>22}" for key in ("last", "best", "last_step"))
        times = f"{row['seconds']['mean']:7.1f} s {row['refresh_seconds']['mean']:7.2f} s"
        lines.append(f"{tb:>14} {cells} {times}")
    return "\n".join([*lines, f"run: {run}", f"plots: {', '.join(path.name for path in plots)}"])


def _cell(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.4e} +- {spread['std']:.1e}" if spread["std"] else f"{spread['mean']:.4e}"
