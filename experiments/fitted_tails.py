"""The final layer of trained networks, with the tail that is fitted to its spectrum (paper, appendix A.2 and Figure 7).

    python -m experiments.fitted_tails                                  train a small network first, minutes
    python -m experiments.fitted_tails --weights runs/NAME              any weights, here of a run of train.cifar
    python -m experiments.fitted_tails --weights FILE.gguf --layer 'blk.0.attn_k.weight'

A final layer has many more inputs than outputs. In the paper, on CIFAR-100, the baseline fits the spectrum of the whole
matrix and takes the layer for a badly trained one; FARMS fits the spectrum of square windows. Without `--weights`, a
ResNet-18 of half the paper's width is trained for a few epochs on coloured digits (100 classes), which is not CIFAR-100
and need not show the same; it is kept, and the same command goes on with what a stopped one has begun. The paper's
networks are `--models resnet34 vgg16 --width 1`; a VGG-16 needs many more epochs.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import farms_jax
from experiments._common import BASELINE, FARMS, Result, figure, label, positive, run
from experiments.coloured_digits import coloured_digits
from farms_jax.errors import InputError
from farms_jax.programs.config_file import read_config, write_config
from farms_jax.weights import open_weights
from train.config import Config, resolve
from train.models import MODELS
from train.training import check_same_data, facts, train_run

WINDOWS = {"baseline": None, "FARMS": farms_jax.Window(per_axis=9)}  # nine for the final layer: paper, Table 15
_COLOURS = {"baseline": BASELINE, "FARMS": FARMS}
_FINAL = r".*linear/kernel"  # of the networks in `train`
_BINS = 36
_DECADES = 50  # axes that span less are ticked at 1, 2 and 5, others at powers of ten
_SHOWN = 1e-3  # of the largest eigenvalue: the histograms begin there


class Spectrum(NamedTuple):
    """What a method sees of a layer.

    Attributes:
        row: of the results.
        eigenvalues: ascending, of the whole matrix or of all windows.
    """

    row: dict[str, Any]
    eigenvalues: np.ndarray


def main() -> None:
    """Run the experiment."""
    run("fitted_tails", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    parser.add_argument("--weights", nargs="+", type=Path, default=[], help="checkpoints, or run directories")
    parser.add_argument("--layer", default=_FINAL, help="regular expression of the layer's name, matched whole")
    parser.add_argument("--models", nargs="+", default=["resnet18"], choices=list(MODELS))
    parser.add_argument("--width", type=float, default=0.5, help="of the networks that are trained")
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--images", type=positive, default=2000, help="to train on, at least 100")


def experiment(args: argparse.Namespace) -> Result:
    """Measure one layer of each of the networks.

    Args:
        args: the options.

    Returns:
        Rows: by network and method alpha and the like of the layer, and `others`, the median alpha of all other layers.
        The summary is the same. Facts: `trained_on`, what the networks have learned, and `accuracy` on its test images
        (%) by network, where they were trained here.

    Raises:
        InputError: weights cannot be used, or the layer is not in them.
    """
    if args.images < 100:
        raise InputError(f"--images must be at least 100, one for each class, got {args.images}")
    runs = args.weights or [train(args, model) for model in args.models]
    spectra = [spectrum for path in runs for spectrum in measure(path, args.layer)]
    rows = [spectrum.row for spectrum in spectra]
    trained_on = "as given" if args.weights else f"{args.images} coloured digits, {args.epochs} epochs"
    accuracy = {} if args.weights else {path.name: _accuracy(path) for path in runs}
    return Result(rows, rows, {"trained_on": trained_on, "accuracy": accuracy}, draw(spectra))


def _accuracy(path: Path) -> float:
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))["best"]["mean"]


def train(args: argparse.Namespace, model: str) -> Path:
    """Train a network on coloured digits, go on with it, or find it trained.

    Args:
        args: the options.
        model: name in `train.models`.

    Returns:
        Its run directory, named by what it depends on.
    """
    path = args.out / f"networks-x{args.width:g}-{args.images}-images-{args.epochs}-epochs" / model
    if (path / "summary.json").is_file():
        return path
    images = coloured_digits(args.images, test=500, seed=0)
    if (path / "config.json").is_file():
        config, before = read_config(path, Config)
        check_same_data(images, before)
    else:
        short: Any = {"model": model, "width": args.width, "epochs": args.epochs, "tb": "none", "augment": False}
        config = resolve(Config(dataset="coloured digits", batch_size=25, **short), small=False)
        write_config(path, config, facts(images))
    train_run(path, config, images)
    return path


def measure(path: Path, pattern: str) -> list[Spectrum]:
    """Measure one layer of a network whole and in windows, and the others for comparison.

    Args:
        path: of its weights.
        pattern: of the layer's name.

    Returns:
        By method what it sees.

    Raises:
        InputError: the pattern is none, or matches no weight or several.
    """
    with open_weights(path) as source:
        names = [name for name in source.tensors if name not in source.skipped]
        layer = _only(names, pattern, path)
        weights = {name: source.read(name).astype(np.float32) for name in names}
        axes, title = source.axes, source.name
    spectra = []
    for method, window in WINDOWS.items():
        report = farms_jax.analyze(weights, window=window, axes=axes, exclude=re.escape(layer))
        others = jax.device_get(report.alpha)
        report = farms_jax.analyze({layer: weights[layer]}, window=window, axes=axes, eigenvalues=True)
        if not report.names or report.eigenvalues is None:
            raise InputError(
                f"{path}: {layer} is no layer that can be measured: {report.left_out[0][1]}; choose another"
            )
        _, _, rows, cols = dict(report.axes)[layer].matrices_shape(weights[layer].shape)
        row = {"network": title, "layer": layer, "shape": f"{rows} x {cols}", "method": method}
        row |= {key: float(getattr(report, key)[0]) for key in ("alpha", "xmin", "ks_distance")}
        row |= {"num_eigenvalues": int(report.num_eigenvalues[0]), "others": float(np.median(others[others > 0]))}
        spectra.append(Spectrum(row, np.sort(np.asarray(report.eigenvalues[0], float).ravel())))
    return spectra


def _only(names: list[str], pattern: str, path: Path) -> str:
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"--layer {pattern!r} is no regular expression ({error}); a plain name will do") from error
    if len(found) != 1:
        raise InputError(
            f"--layer {pattern!r} matches {len(found)} weights of {path}, and has to match one; its last are "
            f"{', '.join(names[-4:])}"
        )
    return found[0]


def draw(spectra: list[Spectrum]) -> Figure:
    """Draw a row of plots per network: the baseline's spectrum and fit, and FARMS's."""
    drawing, axes = figure(9.6, 1.5 * len(spectra), len(spectra) // 2, 2)
    for axis, spectrum in zip(axes, spectra, strict=True):
        _fit(axis, spectrum)
    return drawing


def _fit(axis: Axes, spectrum: Spectrum) -> None:
    """Draw a histogram on two logarithmic axes, the threshold, and the power law from there on."""
    row, values = spectrum
    alpha, xmin = row["alpha"], row["xmin"]
    low, high = max(values[values > 0].min(initial=values[-1]), values[-1] * _SHOWN), values[-1]
    counts, edges = np.histogram(values, np.geomspace(low, high, _BINS))
    density = counts / np.diff(edges) / values.size
    axis.stairs(density, edges, fill=True, color=_COLOURS[row["method"]], alpha=0.4)
    axis.set(xscale="log", yscale="log")
    if alpha > 0:
        x = np.geomspace(xmin, high, 100)
        law = (values >= xmin).mean() * (alpha - 1) / xmin * (x / xmin) ** -alpha
        axis.plot(x, law, color="k", lw=1.5, label=f"power law, alpha = {alpha:.2f}")
        axis.axvline(xmin, color="k", lw=0.9, ls=":", label="start of the tail")
        axis.legend(frameon=False, fontsize=8.5, loc="lower left")
    for direction in (axis.xaxis, axis.yaxis):
        first, last = direction.get_view_interval()
        direction.set_major_locator(LogLocator(subs=(1, 2, 5) if last < _DECADES * first else (1,)))
        direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        direction.set_minor_formatter(NullFormatter())
    name = row["network"].partition(",")[0]
    seen = "whole matrix" if row["method"] == "baseline" else "square windows"
    label(axis, f"{name[:20]}, {row['shape']}: {row['method']}, {seen}", "eigenvalue", "density")


if __name__ == "__main__":
    main()
