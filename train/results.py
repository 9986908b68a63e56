"""Results of a run: accuracies by seed as a summary and a table, and the plots."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax.programs import layer_plots

Rows = list[dict[str, Any]]


def summarise(metrics: dict[int, Rows]) -> dict[str, Any]:
    """Return last and best test accuracy of each seed, in per cent, with mean and standard deviation (0 for one seed).

    Here and below, `metrics` are the lines of `metrics.jsonl` by seed, and `layers` those of `layers.csv`.
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


def table(summary: dict[str, Any], data: str, run: Path, plots: list[Path]) -> str:
    """Format the summary for the terminal."""
    lines = [f"\ntest accuracy on {data} (%)", f"{'seed':>6} {'last':>8} {'best':>8} {'time':>9} {'refresh':>9}"]
    for seed, row in summary["seeds"].items():
        times = f"{row['seconds']:7.1f} s {row['refresh_seconds']:7.1f} s"
        lines.append(f"{seed:>6} {row['last']:8.2f} {row['best']:8.2f} {times}")
    if len(summary["seeds"]) > 1:
        for name in ("mean", "std"):
            lines.append(f"{name:>6} {summary['last'][name]:8.2f} {summary['best'][name]:8.2f}")
    names = ", ".join(path.name for path in plots)
    return "\n".join([*lines, f"run: {run}", f"plots: {names}"])


def plot_run(run: Path, metrics: dict[int, Rows], layers: dict[int, Rows], title: str) -> list[Path]:
    """Draw the plots of a run, and return their files."""
    figures = {
        "learning_curves.png": _learning_curves(metrics, title),
        "layers.png": layer_plots.layer_history(next(iter(layers.values())), title),  # the first seed's
        "alphas.png": layer_plots.alpha_distribution({f"seed {seed}": rows for seed, rows in layers.items()}, title),
    }
    return layer_plots.save(run, figures)


def _learning_curves(metrics: dict[int, Rows], title: str) -> Figure:
    drawing, (loss, accuracy) = figure(title, 2)
    for index, (seed, rows) in enumerate(metrics.items()):
        epochs = [row["epoch"] + 1 for row in rows]
        for axis, measure in ((loss, "loss"), (accuracy, "accuracy")):
            factor = 100 if measure == "accuracy" else 1
            for part, style in (("train", "--"), ("test", "-")):
                values = [factor * row[f"{part}_{measure}"] for row in rows]
                axis.plot(epochs, values, style, marker=".", color=f"C{index}", label=f"{part}, seed {seed}")
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracy.legend(fontsize=8)
    return drawing
