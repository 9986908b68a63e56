"""What the aspect ratio alone does to a spectrum, and to alpha (paper, section 3.2, appendix B, Figures 2 and 8).

    python -m experiments.marchenko_pastur

Matrices of independent normal entries have nothing to tell. Their eigenvalues follow the Marchenko-Pastur law, the more
concentrated the further the matrix is from a square, and alpha of whole matrices rises with it; alpha of square windows
does not.
"""

import argparse
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import farms_jax
from experiments._common import BASELINE, FARMS, NOISE, Result, figure, label, positive, run
from farms_jax import marchenko_pastur
from farms_jax.errors import InputError

_SHOWN = 4  # aspect ratios in the histograms
_BINS = 40


def main() -> None:
    """Run the experiment."""
    run("marchenko_pastur", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    parser.add_argument("--rows", type=positive, default=500, help="of every matrix, its shorter axis")
    ratios = [1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0]
    parser.add_argument("--aspect-ratios", nargs="+", type=float, default=ratios, help="columns over rows, at least 1")
    parser.add_argument("--repeats", type=positive, default=5, help="matrices of each shape")


def experiment(args: argparse.Namespace) -> Result:
    """Measure matrices of noise of every aspect ratio.

    Args:
        args: the options.

    Returns:
        Rows: by aspect ratio the edges of the law, alpha of the law, mean and deviation over the matrices of alpha of
        whole matrices and of windows, and `ks`, the largest distance between the law and the eigenvalues of all
        matrices as distribution functions. The summary is the same.

    Raises:
        InputError: an aspect ratio is below 1.
    """
    if min(args.aspect_ratios) < 1:
        raise InputError(
            f"--aspect-ratios must be at least 1, the longer axis over the shorter; got {args.aspect_ratios}"
        )
    rows, spectra = [], {}
    for ratio in tqdm(sorted(args.aspect_ratios), desc="marchenko_pastur", unit="shape", leave=False):
        row, spectra[ratio] = measure(args.rows, round(args.rows * ratio), args.repeats)
        rows.append(row)
    return Result(rows, rows, {}, draw(rows, spectra))


def measure(rows: int, cols: int, seeds: int) -> tuple[dict[str, Any], np.ndarray]:
    """Measure matrices of noise of one shape.

    Args:
        rows: shorter axis.
        cols: longer axis.
        seeds: matrices.

    Returns:
        The row of the shape, and the eigenvalues of all W W^T / cols, ascending.
    """
    matrices = {
        str(seed): np.random.default_rng([seed, cols]).standard_normal((rows, cols), np.float32)
        for seed in range(seeds)
    }
    whole = farms_jax.analyze(matrices, window=None, axes=farms_jax.TORCH_AXES, eigenvalues=True)
    windows = jax.device_get(farms_jax.analyze(matrices, axes=farms_jax.TORCH_AXES).alpha)
    assert whole.eigenvalues is not None
    eigenvalues = np.sort(np.concatenate([np.asarray(values, float).ravel() for values in whole.eigenvalues])) / cols
    share = marchenko_pastur.cdf(eigenvalues, rows / cols)
    steps = np.arange(eigenvalues.size + 1) / eigenvalues.size
    low, high = marchenko_pastur.edges(rows / cols)
    return {
        "aspect_ratio": cols / rows,
        "lower_edge": low,
        "upper_edge": high,
        "ks": float(max(np.abs(share - steps[1:]).max(), np.abs(share - steps[:-1]).max())),
        "alpha_law": marchenko_pastur.hill_alpha(rows / cols),
        "alpha_whole": float(np.mean(whole.alpha)),
        "std_whole": float(np.std(whole.alpha)),
        "alpha_farms": float(windows.mean()),
        "std_farms": float(windows.std()),
    }, eigenvalues


def draw(rows: list[dict[str, Any]], spectra: dict[float, np.ndarray]) -> Figure:
    """Draw the spectra with the law, and alpha against the aspect ratio."""
    drawing, (left, right) = figure(9.6, 3.6, 1, 2, width_ratios=(1.25, 1))
    _spectra(left, spectra)
    ratios = [row["aspect_ratio"] for row in rows]
    fine = np.linspace(min(ratios), max(ratios), 200)
    law = [marchenko_pastur.hill_alpha(1 / ratio) for ratio in fine]
    right.plot(fine, law, color=BASELINE, lw=1, ls="--", label="theory: whole matrix")
    for method, name, colour in (
        ("whole", "baseline: whole matrices", BASELINE),
        ("farms", "FARMS: square windows", FARMS),
    ):
        means, deviations = ([row[f"{key}_{method}"] for row in rows] for key in ("alpha", "std"))
        right.errorbar(ratios, means, deviations, fmt="o", color=colour, ms=5, capsize=3, label=name)
    right.axhline(marchenko_pastur.hill_alpha(1.0), color=NOISE, lw=1, ls="--", label="theory: square matrix")
    right.legend(frameon=False, fontsize=8.5)
    label(right, "Alpha of noise, by the shape of its matrix", "aspect ratio: columns / rows", "alpha")
    return drawing


def _spectra(axis: Axes, spectra: dict[float, np.ndarray]) -> None:
    """Draw histograms of a few aspect ratios, from the narrowest to the widest, with the law's density over them."""
    chosen = np.unique(np.linspace(0, len(spectra) - 1, _SHOWN).round().astype(int))
    colours = ("#0072B2", "#009E73", "#E69F00", "#CC79A7")
    for ratio, colour in zip([list(spectra)[i] for i in chosen], colours, strict=False):
        low, high = marchenko_pastur.edges(1 / ratio)
        x = np.linspace(max(low, 1e-3), high, 600)
        axis.hist(spectra[ratio], bins=_BINS, density=True, color=colour, alpha=0.3)
        axis.plot(x, marchenko_pastur.density(x, 1 / ratio), color=colour, lw=1.6, label=f"{ratio:g} : 1")
    axis.set(xlim=(0, 4.1), ylim=(0, 1.5))
    axis.legend(title="columns : rows", frameon=False, fontsize=8.5, title_fontsize=8.5)
    label(axis, "Eigenvalues of noise (bars) and the Marchenko-Pastur law", "eigenvalue of $WW^T$ / columns", "density")


if __name__ == "__main__":
    main()
