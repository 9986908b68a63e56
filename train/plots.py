"""Plots of a run: learning curves, alpha and rate of every layer over epochs, the distribution of alpha."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax.programs import plots


def plot_run(run: Path, seeds: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]], title: str) -> list[Path]:
    """Draw the plots of a run.

    Args:
        run: directory to write to.
        seeds: per seed its `metrics.jsonl` and `layers.csv` rows.
        title: what was trained, on which data.

    Returns:
        The files: `learning_curves.png`, `layers.png` (paper, Figure 12, of the first seed) and `alphas.png`
        (Figure 5, of the last epoch).
    """
    _, layers = next(iter(seeds.values()))
    figures = {
        "learning_curves.png": _learning_curves({seed: metrics for seed, (metrics, _) in seeds.items()}, title),
        "layers.png": plots.layer_history(layers, title),
        "alphas.png": plots.alpha_distribution({f"seed {seed}": rows for seed, (_, rows) in seeds.items()}, title),
    }
    return plots.save(run, figures)


def _learning_curves(metrics: dict[int, list[dict[str, Any]]], title: str) -> Figure:
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
