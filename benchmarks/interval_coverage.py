"""Coverage of the confidence intervals of alpha: how often they hold the mean over an ensemble of random matrices.

    python -m benchmarks.interval_coverage [--draws 200] [--json results.json]

Per kind of matrix and shape, so many layers are drawn and diagnosed; the mean of their alphas is what each one's 95 %
interval should hold. Beside the coverage, the width of an interval against the scatter that it stands for: 1 is exact,
above 1 is careful.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from benchmarks._common import machine, write
from farms_jax import FLAX_AXES, Tail, Window
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.settings import Settings

NORMAL_95 = 1.96  # half of a 95 % interval, in deviations


def spiked(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise and eight directions of falling strength, others in each matrix."""
    *positions, rows, cols = shape
    left = rng.standard_normal((*positions, rows, 8)) * 2.0 ** (1 - np.arange(8))
    return rng.standard_normal(shape) + left @ rng.standard_normal((*positions, 8, cols))


def power_law(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise whose covariance has eigenvalues 1/k, in the same random directions for all matrices of one width."""
    return rng.standard_normal(shape) @ _mixing(shape[-1])


@functools.cache
def _mixing(cols: int) -> np.ndarray:
    directions, _ = np.linalg.qr(np.random.default_rng(cols).standard_normal((cols, cols)))
    return (directions * np.arange(1, cols + 1) ** -0.5) @ directions.T


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "student t, 3": lambda rng, shape: rng.standard_t(3, shape),
    "student t, 1.5": lambda rng, shape: rng.standard_t(1.5, shape),
    "spiked": spiked,
    "power-law covariance": power_law,
}
CASES: list[tuple[str, tuple[int, ...], Window]] = [
    ("128 x 128", (128, 128), Window()),
    ("256 x 256", (256, 256), Window()),
    ("64 x 96", (64, 96), Window()),
    ("64 x 128", (64, 128), Window()),
    ("64 x 256", (64, 256), Window()),
    ("64 x 1024", (64, 1024), Window()),
    ("128 x 192, windows of 32", (128, 192), Window(rows=32)),
    ("kernel 3 x 3 x 64 x 64", (3, 3, 64, 64), Window()),
    ("kernel 3 x 3 x 64 x 128", (3, 3, 64, 128), Window()),
    ("kernel 7 x 7 x 3 x 64", (7, 7, 3, 64), Window()),
    ("kernel 1 x 1 x 64 x 256", (1, 1, 64, 256), Window()),
]


def coverage(
    kind: str,
    shape: tuple[int, ...],
    window: Window,
    draws: int,
    rule: Literal["median", "peak", "ks"] = "median",
    seed: int = 0,
) -> dict[str, Any]:
    """Diagnose draws of one kind of layer.

    Args:
        kind: key of `KINDS`.
        shape: of the weight, Flax's axes.
        window: windows of FARMS.
        draws: layers.
        rule: of the tail's threshold.
        seed: of the layers.

    Returns:
        Mean and deviation of alpha, share of intervals that hold the mean, and their width against the deviation.
    """
    rng = np.random.default_rng(seed)
    settings = Settings(window=window, tail=Tail(rule), whole=False, randomize=False)
    weights = {str(i): KINDS[kind](rng, shape).astype(np.float32) for i in range(draws)}
    rows = [found.row for found in measure(weights, FLAX_AXES, settings).values()]
    alpha, low, high = (np.array([row[name] for row in rows]) for name in ("alpha", "alpha_low", "alpha_high"))
    mean, deviation = float(alpha.mean()), float(alpha.std())
    return {
        "alpha": mean,
        "deviation": deviation,
        "coverage": float(((low <= mean) & (mean <= high)).mean()),
        "width": float((high - low).mean() / (2 * NORMAL_95 * deviation)),
    }


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="layers of each kind and shape")
    parser.add_argument("--tail", default="median", choices=["median", "peak", "ks"])
    parser.add_argument("--json", default="benchmarks/results/interval_coverage.json")
    args = parser.parse_args()
    results = []
    print(f"{'kind':22} {'layer':26} {'alpha':>6} {'deviation':>9} {'coverage':>8} {'width':>6}")
    for kind, (label, shape, window) in tqdm([(k, c) for k in KINDS for c in CASES], unit="case", leave=False):
        row = coverage(kind, shape, window, args.draws, args.tail)
        results.append({"kind": kind, "layer": label, **row})
        tqdm.write(
            f"{kind:22} {label:26} {row['alpha']:6.3f} {row['deviation']:9.4f} "
            f"{row['coverage']:8.1%} {row['width']:6.2f}"
        )
    inside = np.mean([0.9 <= row["coverage"] <= 0.99 for row in results])
    least, mean = min(row["coverage"] for row in results), np.mean([row["coverage"] for row in results])
    print(f"\ncoverage: mean {mean:.1%}, least {least:.1%}, within 90 .. 99 % in {inside:.0%} of the cases")
    write(args.json, {"machine": machine(), "draws": args.draws, "tail": args.tail, "level": 0.95, "cases": results})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
