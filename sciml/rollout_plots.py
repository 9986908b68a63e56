"""Plots of a run: predicted against true fields, errors over the rollout, alpha of the layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from .results import Results
from .steps import rollout

_SHOWN = ("Vx", "density")
_COLUMNS = 4  # times at which fields are drawn


def plot_run(run: Path, experiment: Experiment, results: dict[tuple[TB, int], Results], before: Any) -> list[Path]:
    """Return the files of a run's plots, drawn here.

    Per setting, of the first seed: `prediction_TB.png` (and `.npz`: a test trajectory, true and predicted) and
    `layers_TB.png`. Over all: `rollout.png`, the error over time; `alphas.png` and `alphas_by_layer.png`, the layers at
    the end, all measured alike by FARMS windows (paper, Figure 11).
    """
    config, title = experiment.config, experiment.title()
    first = {str(tb): result for (tb, seed), result in results.items() if seed == config.seeds[0]}
    alphas = {tb: _alphas(result.params, config) for tb, result in first.items()}
    figures = {
        "rollout.png": _rollout(results, before, config, title),
        "alphas.png": alpha_distribution(alphas, title),
        "alphas_by_layer.png": _by_layer(alphas, title),
    }
    times, true, predicted = _predict(experiment, {tb: result.params for tb, result in first.items()})
    for tb, result in first.items():
        with atomic(run / f"prediction_{tb}.npz") as part, part.open("wb") as file:
            np.savez(file, step=times, true=true, predicted=predicted[tb])
        figures[f"prediction_{tb}.png"] = _prediction(times, true, predicted[tb], f"{title}: {tb}")
        figures[f"layers_{tb}.png"] = layer_history(result.layers, f"{title}: {tb}")
    return save(run, figures)


def _alphas(params: Any, config: Config) -> list[dict[str, Any]]:
    report = measure(params, config, "farms")
    return [{"epoch": 0, "layer": name, "alpha": row["alpha"]} for name, row in report.to_dict().items()]


def _predict(experiment: Experiment, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return steps (S,), and true and predicted fields (X, Y, S, C) of the first test trajectory."""
    config, fields = experiment.config, experiment.finetune.test
    steps = min(config.test_steps or fields.steps, fields.steps - config.in_steps)
    whole = fields.read(0, 0, config.in_steps + steps)
    seen = jnp.asarray(whole[None, ..., : config.in_steps, :])
    predict = jax.jit(lambda params: rollout(experiment.network, params, seen, steps))
    predicted = {tb: np.asarray(predict(own)[0]) for tb, own in params.items()}
    return config.in_steps + np.arange(steps), whole[..., config.in_steps :, :], predicted


def _prediction(times: np.ndarray, true: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """Draw three rows per channel: true, predicted, and the error; columns are times."""
    columns = np.unique(np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int))
    drawing = Figure(figsize=(2.2 * len(columns) + 1, 5.4 * len(_SHOWN)), layout="constrained")
    drawing.suptitle(title, fontsize=9)
    axes = drawing.subplots(3 * len(_SHOWN), len(columns), squeeze=False)
    for place, name in enumerate(_SHOWN):
        channel = CHANNELS.index(name)
        fields = [field[..., channel][..., columns] for field in (true, predicted)]
        error = np.abs(fields[1] - fields[0])
        limits = fields[0].min(), fields[0].max()
        rows = axes[3 * place : 3 * place + 3]
        for row, values in zip(rows, fields, strict=False):
            _row(drawing, row, values, limits, "viridis")
        _row(drawing, rows[2], error, (0, error.max()), "magma")
        for row, kind in zip(rows, ("true", "predicted", "|error|"), strict=True):
            row[0].set_ylabel(f"{name}, {kind}", fontsize=8)
        for axis, column in zip(rows[0], columns, strict=True):
            axis.set_title(f"step {times[column]}", fontsize=8)
    return drawing


def _row(drawing: Figure, axes: Sequence[Any], values: np.ndarray, limits: tuple[float, float], colours: str) -> None:
    images = [
        axis.imshow(values[..., column].T, origin="lower", vmin=limits[0], vmax=limits[1], cmap=colours)
        for column, axis in enumerate(axes)
    ]
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    drawing.colorbar(images[0], ax=axes, shrink=0.85)


def _rollout(results: dict[tuple[TB, int], Results], before: Any, config: Config, title: str) -> Figure:
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


def _by_layer(alphas: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    drawing, (axis,) = figure(title, 1, epochs=False)
    for tb, rows in alphas.items():
        axis.plot([row["layer"] for row in rows], [row["alpha"] or np.nan for row in rows], marker=".", label=tb)
    axis.set(ylabel="alpha (PL_Alpha_Hill)")
    axis.tick_params(axis="x", labelrotation=90, labelsize=6)
    axis.legend(fontsize=8)
    return drawing
