"""Alphas of networks at random initialisation (paper, appendix A.1 and Figure 6).

    python -m experiments.random_init

No layer of a network that was never trained is better trained than another: an estimate of training quality should give
all of them one number, at every width. Weights are normal with variance 2 / inputs (He et al., 2015). The baseline
measures whole matrices; FARMS measures windows with as many rows as columns.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import farms_jax
from experiments._common import BASELINE, FARMS, NOISE, Result, figure, label, positive, run
from farms_jax.errors import InputError
from farms_jax.marchenko_pastur import hill_alpha
from train.models import MODELS

WINDOWS = {"baseline": None, "FARMS": farms_jax.Window(per_axis=9)}  # nine for the final layer: paper, Table 15
_COLOURS = {"baseline": BASELINE, "FARMS": FARMS}
_LABELS = {"baseline": "baseline: whole matrices", "FARMS": "FARMS: square windows"}
_SMALL: Any = {"fontsize": 7, "ha": "center", "color": BASELINE}
_TITLES = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "vgg16": "VGG-16"}
_TITLES["vgg19"] = "VGG-19"


def main() -> None:
    """Run the experiment."""
    run("random_init", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    parser.add_argument("--models", nargs="+", default=["resnet34", "vgg19"], choices=list(MODELS))
    parser.add_argument(
        "--widths", nargs="+", type=float, default=[0.25, 0.5, 1.0, 2.0], help="factors on all channels"
    )
    parser.add_argument("--depth-width", type=float, default=1.0, help="the width that is shown layer by layer")
    parser.add_argument("--classes", type=positive, default=100, help="outputs of the final layer")
    parser.add_argument("--repeats", type=positive, default=3, help="draws of every network")


def experiment(args: argparse.Namespace) -> Result:
    """Measure the networks at every width.

    Args:
        args: the options.

    Returns:
        Rows: alpha by network, width, seed, method and layer. Summary: see `summarise`. Facts: `spread`, by network and
        method how far the means of the widths lie apart; `noise`, alpha of a large square matrix of noise.

    Raises:
        InputError: a width leaves a network without channels.
    """
    if min(args.widths) < 1 / 32:
        raise InputError(f"--widths must be at least 1/32, got {min(args.widths):g}: a layer would have no channel")
    if args.depth_width not in args.widths:
        raise InputError(f"--depth-width {args.depth_width:g} is none of the --widths; add it there, or choose one")
    cases = [(model, width, seed) for model in args.models for width in args.widths for seed in range(args.repeats)]
    rows = []
    for model, width, seed in tqdm(cases, desc="random_init", unit="network", leave=False):
        weights = he_weights(model, width, args.classes, seed)
        for method, alphas in measure(weights).items():
            case = {"model": model, "width": width, "seed": seed, "method": method}
            rows += [
                {**case, "layer": layer, "aspect_ratio": aspect_ratio(weights[layer]), "alpha": alpha}
                for layer, alpha in alphas.items()
            ]
    summary = summarise(rows)
    drawing = draw(rows, summary, args.models, args.depth_width)
    return Result(rows, summary, {"spread": spreads(summary), "noise": hill_alpha(1.0)}, drawing)


def he_weights(model: str, width: float, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Draw the matrices and kernels of a network, which is never built.

    Args:
        model: name in `train.models`.
        width: factor on its channels.
        classes: outputs of its final layer.
        seed: of the draw.

    Returns:
        Weights (..., inputs, outputs) by name, normal with mean 0 and variance 2 / inputs, kernel positions counted.
    """
    network = nnx.eval_shape(lambda: MODELS[model].build(num_classes=classes, width=width, rngs=nnx.Rngs(0)))
    shapes = nnx.state(network, nnx.Param)
    generator = np.random.default_rng(seed)
    weights = {}
    for name, leaf in farms_jax.named_leaves(shapes):
        if len(leaf.shape) > 1:
            weights[name] = generator.standard_normal(leaf.shape, np.float32)
            weights[name] *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
    return weights


def measure(weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return by method the alpha of every layer, in network order."""
    reports = {method: farms_jax.analyze(weights, window=window) for method, window in WINDOWS.items()}
    return {
        method: dict(zip(report.names, jax.device_get(report.alpha).tolist(), strict=True))
        for method, report in reports.items()
    }


def aspect_ratio(weight: np.ndarray) -> float:
    """Return the longer axis of a weight's matrices over the shorter."""
    inputs, outputs = weight.shape[-2:]
    return max(inputs, outputs) / min(inputs, outputs)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by network, width and method the mean alpha with its deviation over seeds, and the extremes of a layer."""
    groups: dict[tuple[str, float, str], dict[int, list[float]]] = {}
    for row in rows:
        by_seed = groups.setdefault((row["model"], row["width"], row["method"]), {})
        by_seed.setdefault(row["seed"], []).append(row["alpha"])
    summary = []
    for group, by_seed in groups.items():
        alphas = np.array(list(by_seed.values()))
        means = alphas.mean(1)
        row = dict(zip(("model", "width", "method"), group, strict=True))
        row |= {"mean": float(means.mean()), "std": float(means.std(ddof=1)) if len(means) > 1 else 0.0}
        summary.append(row | {"lowest": float(alphas.min()), "highest": float(alphas.max())})
    return summary


def spreads(summary: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by network and method the largest mean alpha of a width less the smallest."""
    found: dict[str, dict[str, float]] = {}
    for model in dict.fromkeys(row["model"] for row in summary):
        for method in WINDOWS:
            means = [row["mean"] for row in summary if (row["model"], row["method"]) == (model, method)]
            found.setdefault(model, {})[method] = max(means) - min(means)
    return found


def draw(rows: list[dict[str, Any]], summary: list[dict[str, Any]], models: list[str], width: float) -> Figure:
    """Draw a row of two plots per network: alpha by depth, and by width."""
    drawing, axes = figure(9.6, 3.0 * len(models), len(models), 2, width_ratios=(1.7, 1))
    for index, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model and row["width"] == width]
        _by_depth(axes[2 * index], mine, f"{_TITLES[model]}, width {width:g}: alpha of each layer")
        mine = [row for row in summary if row["model"] == model]
        _by_width(axes[2 * index + 1], mine, f"{_TITLES[model]}: mean over the layers")
    axes[0].legend(frameon=False, fontsize=9, loc="upper center")
    return drawing


def _by_depth(axis: Axes, rows: list[dict[str, Any]], title: str) -> None:
    for method, colour in _COLOURS.items():
        alphas: dict[tuple[str, float], list[float]] = {}
        for row in rows:
            if row["method"] == method:
                alphas.setdefault((row["layer"], row["aspect_ratio"]), []).append(row["alpha"])
        means = [float(np.mean(values)) for values in alphas.values()]
        axis.plot(range(1, len(means) + 1), means, "o-", color=colour, ms=3.5, lw=1.2, label=_LABELS[method])
        if method == "baseline":
            for place, ((_, ratio), mean) in enumerate(zip(alphas, means, strict=True), start=1):
                if ratio > 1:
                    axis.annotate(f"{ratio:.0f} : 1", (place, mean), (0, 5), textcoords="offset points", **_SMALL)
    axis.axhline(hill_alpha(1.0), color=NOISE, lw=1, ls="--", label="theory: square matrix of noise")
    axis.margins(y=0.14)
    label(axis, title, "layer, first to last; labels: aspect ratio", "alpha")


def _by_width(axis: Axes, summary: list[dict[str, Any]], title: str) -> None:
    for method, colour in _COLOURS.items():
        mine = sorted((row for row in summary if row["method"] == method), key=lambda row: row["width"])
        widths, means, deviations = (np.array([row[key] for row in mine]) for key in ("width", "mean", "std"))
        axis.errorbar(widths, means, deviations, fmt="o-", color=colour, ms=4.5, lw=1.4, capsize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [f"{width:g}" for width in widths])
    axis.axhline(hill_alpha(1.0), color=NOISE, lw=1, ls="--")
    axis.minorticks_off()
    label(axis, title, "width: factor on all channels", "alpha")


if __name__ == "__main__":
    main()
