"""Results of a run: errors by setting over the seeds, as a summary, a table and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from farms_jax._figures import figure
from farms_jax.programs.files import atomic
from farms_jax.programs.layer_plots import alpha_distribution, layer_history, save

from .balanced_layers import measure
from .config import TB, Config
from .hdf5 import CHANNELS
from .preparation import Experiment
from .steps import rollout

_SHOWN = ("Vx", "density")
_COLUMNS = 4  # times at which fields are drawn


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
    settings: dict[str, Any] = {}
    for (tb, seed), result in results.items():
        lines = result.metrics
        settings.setdefault(tb, {"seeds": {}})["seeds"][seed] = {
            "last": lines[-1]["test_l2re"],
            "best": min(line["test_l2re"] for line in lines),
            "last_step": lines[-1]["test_l2re_step"],
            "seconds": sum(line["seconds"] for line in lines),
            "refresh_seconds": sum(line["refresh_seconds"] for line in lines),
        }
    for setting in settings.values():
        rows = list(setting["seeds"].values())
        for key in rows[0]:
            values = [row[key] for row in rows]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            setting[key] = {"mean": float(np.mean(values)), "std": deviation}
    return {"before": before, "settings": settings}


def table(summary: dict[str, Any], run: Path, plots: list[Path]) -> str:
    """Return the summary as lines for the terminal."""

    def cell(spread: dict[str, float]) -> str:
        return f"{spread['mean']:.4e} +- {spread['std']:.1e}" if spread["std"] else f"{spread['mean']:.4e}"

    before = summary["before"]
    lines = [
        "\nL2RE of the test trajectories, mean and deviation over the seeds",
        f"{'':>14} {'rollout':>22} {'best':>22} {'per step':>22} {'time':>9} {'refresh':>9}",
        f"{'before':>14} {before['test_l2re']:>22.4e} {'':>22} {before['test_l2re_step']:>22.4e}",
    ]
    for tb, row in summary["settings"].items():
        cells = " ".join(f"{cell(row[key]):>22}" for key in ("last", "best", "last_step"))
        lines.append(f"{tb:>14} {cells} {row['seconds']['mean']:7.1f} s {row['refresh_seconds']['mean']:7.2f} s")
    return "\n".join([*lines, f"run: {run}", f"plots: {', '.join(path.name for path in plots)}"])


def plot_run(run: Path, experiment: Experiment, results: dict[tuple[TB, int], Results], before: Any) -> list[Path]:
    """Return the files of a run's plots, drawn here.

    Per setting, of the first seed: `prediction_TB.png` (and `.npz`: a test trajectory, true and predicted) and
    `layers_TB.png`. Over all: `rollout.png`, the error over time; `alphas.png` and `alphas_by_layer.png`, the layers at
    the end, all measured alike by FARMS windows (paper, Figure 11).
    """
    config, title = experiment.config, experiment.title()
    first = {str(tb): result for (tb, seed), result in results.items() if seed == config.seeds[0]}
    reports = {tb: measure(result.params, config, "farms").to_dict() for tb, result in first.items()}
    alphas = {
        tb: [{"epoch": 0, "layer": name, "alpha": row["alpha"]} for name, row in report.items()]
        for tb, report in reports.items()
    }
    figures = {
        "rollout.png": _plot_rollout(results, before, config, title),
        "alphas.png": alpha_distribution(alphas, title),
        "alphas_by_layer.png": _plot_layers(alphas, title),
    }
    times, true, predicted = _predict(experiment, {tb: result.params for tb, result in first.items()})
    for tb, result in first.items():
        with atomic(run / f"prediction_{tb}.npz") as part, part.open("wb") as file:
            np.savez(file, step=times, true=true, predicted=predicted[tb])
        figures[f"prediction_{tb}.png"] = _plot_prediction(times, true, predicted[tb], f"{title}: {tb}")
        figures[f"layers_{tb}.png"] = layer_history(result.layers, f"{title}: {tb}")
    return save(run, figures)


def _predict(experiment: Experiment, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return steps (S,), and true and predicted fields (X, Y, S, C) of the first test trajectory."""
    config, fields = experiment.config, experiment.finetune.test
    steps = min(config.test_steps or fields.steps, fields.steps - config.in_steps)
    whole = fields.read(0, 0, config.in_steps + steps)
    seen = jnp.asarray(whole[None, ..., : config.in_steps, :])
    predict = jax.jit(lambda params: rollout(experiment.network, params, seen, steps))
    predicted = {tb: np.asarray(predict(own)[0]) for tb, own in params.items()}
    return config.in_steps + np.arange(steps), whole[..., config.in_steps :, :], predicted


def _plot_prediction(times: np.ndarray, true: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """Draw three rows per channel: true, predicted, and the error; columns are times."""
    columns = np.unique(np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int))
    drawing = Figure(figsize=(2.2 * len(columns) + 1, 5.4 * len(_SHOWN)), layout="constrained")
    drawing.suptitle(title, fontsize=9)
    rows = drawing.subplots(3 * len(_SHOWN), len(columns), squeeze=False)

    def draw(axes: Sequence[Any], label: str, values: np.ndarray, limits: tuple[float, float], colours: str) -> None:
        axes[0].set_ylabel(label, fontsize=8)
        images = [
            axis.imshow(values[..., column].T, origin="lower", vmin=limits[0], vmax=limits[1], cmap=colours)
            for column, axis in enumerate(axes)
        ]
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        drawing.colorbar(images[0], ax=axes, shrink=0.85)

    for top, name in zip(range(0, len(rows), 3), _SHOWN, strict=True):
        expected, found = (field[..., CHANNELS.index(name)][..., columns] for field in (true, predicted))
        error, limits = np.abs(found - expected), (expected.min(), expected.max())
        draw(rows[top], f"{name}, true", expected, limits, "viridis")
        draw(rows[top + 1], f"{name}, predicted", found, limits, "viridis")
        draw(rows[top + 2], f"{name}, |error|", error, (0, error.max()), "magma")
        for axis, column in zip(rows[top], columns, strict=True):
            axis.set_title(f"step {times[column]}", fontsize=8)
    return drawing


def _plot_rollout(results: dict[tuple[TB, int], Results], before: Any, config: Config, title: str) -> Figure:
    drawing, (axis,) = figure(title, 1)
    errors: dict[str, list[Any]] = {"before fine-tuning": [before["test_l2re_by_step"]]}
    for (tb, _), result in results.items():
        errors.setdefault(tb, []).append(result.metrics[-1]["test_l2re_by_step"])
    for index, (name, lines) in enumerate(errors.items()):
        steps = config.in_steps + np.arange(len(lines[0]))
        colour, style = ("grey", "--") if not index else (f"C{index - 1}", "-")
        axis.plot(steps, np.mean(lines, axis=0), style, marker=".", label=name, color=colour)
        axis.fill_between(steps, np.min(lines, axis=0), np.max(lines, axis=0), alpha=0.15, color=colour)
    axis.set(xlabel="time step", ylabel="L2RE of the test trajectories", yscale="log")
    axis.legend(fontsize=8)
    return drawing


def _plot_layers(alphas: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, epochs=False)
    for tb, rows in alphas.items():
        axis.plot([row["layer"] for row in rows], [row["alpha"] or np.nan for row in rows], marker=".", label=tb)
    axis.set(ylabel="alpha (PL_Alpha_Hill)")
    axis.tick_params(axis="x", labelrotation=90, labelsize=6)
    axis.legend(fontsize=8)
    return drawing
