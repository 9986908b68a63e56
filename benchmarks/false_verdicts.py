"""False and missed verdicts: what `diagnose` says of layers whose truth is known.

    python -m benchmarks.false_verdicts [--draws 8] [--json results.json]

Random layers of the usual initialisers, formats and shapes should be called noise ("undertrained"), or too few to say,
and orthogonal ones orthogonal; kinds that are not always are printed at the end, so that no mean hides them. Planted
power laws and spikes should be called anything but noise, and matrices that are special by what they are exactly (low
rank, dead rows, constants) should be called that.
"""

import argparse
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.nn import initializers
from scipy.special import ndtri
from tqdm import tqdm

from benchmarks._common import machine, write
from farms_jax import AxisRules, diagnose
from farms_jax.diagnosis.status import MISSING

LAYERS = 24  # of the depth by which residual initialisation scales
SHAPES: dict[str, tuple[int, ...]] = {  # Flax's axes
    "square 256": (256, 256),
    "1:4": (128, 512),
    "1:64": (64, 4096),
    "conv 3 x 3": (3, 3, 64, 128),
    "conv 1 x 1": (1, 1, 64, 256),
    "conv 7 x 7, 3 channels": (7, 7, 3, 64),
    "depthwise 3 x 3": (3, 3, 1, 96),
    "grouped 3 x 3, 4 channels": (3, 3, 4, 128),
    "head of 10": (512, 10),
    "head of 4": (512, 4),
    "head of 5": (512, 5),
    "head of 1": (512, 1),
    "tiny": (8, 12),
    "8 x 8": (8, 8),
    "16 x 16": (16, 16),
    "32 x 32": (32, 32),
    "64:1": (4096, 64),
    "conv of 5": (5, 64, 128),
    "conv 3 x 3 x 3": (3, 3, 3, 16, 32),
}
AXES = AxisRules({".*": "IO|KIO|KKIO|KKKIO"})
NF4 = [  # levels of bitsandbytes' NormalFloat: quantiles of the normal law
    *-ndtri(np.linspace(0.9677083, 0.5, 8)[:-1]),
    *ndtri(np.linspace(0.9677083, 0.5, 9)),
]
INITIALISERS: dict[str, Callable[..., Any]] = {
    "normal": initializers.normal(0.02),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-0.05, maxval=0.05),
    "truncated normal": initializers.truncated_normal(0.02),
    "Xavier normal": initializers.glorot_normal(),
    "Xavier uniform": initializers.glorot_uniform(),
    "He normal": initializers.he_normal(),
    "He uniform": initializers.he_uniform(),
    "LeCun normal": initializers.lecun_normal(),
    "He normal, fan out": initializers.variance_scaling(2.0, "fan_out", "normal"),
    "residual, scaled": initializers.normal(0.02 / (2 * LAYERS) ** 0.5),
    "normal, half pruned": lambda key, shape: _pruned(initializers.normal(0.02)(key, shape), 0.5),
    "normal, bfloat16": lambda key, shape: np.asarray(initializers.normal(0.02)(key, shape, "bfloat16"), np.float32),
    "normal, float16": lambda key, shape: np.asarray(initializers.normal(0.02)(key, shape, "float16"), np.float32),
    "normal, int8 by outputs": lambda key, shape: _rounded(initializers.normal(0.02)(key, shape), None, 127),
    "normal, 4 bits by 32": lambda key, shape: _rounded(initializers.normal(0.02)(key, shape), 32, 7),
    "normal, NF4 by 64": lambda key, shape: _nf4(initializers.normal(0.02)(key, shape)),
    "normal, Q4_0": lambda key, shape: _q4_0(initializers.normal(0.02)(key, shape)),
    "sparse, 10 %": lambda key, shape: _pruned(initializers.normal(1.0)(key, shape), 0.9),
    "orthogonal": initializers.orthogonal(),
}
FEW = {"head of 1", "head of 4", "head of 5", "grouped 3 x 3, 4 channels", "tiny", "8 x 8"}
PLANTED = ("square 256", "1:4", "conv 1 x 1")
EXPONENTS = (1.5, 2.0, 2.5, 3.0, 4.0)
MARGIN = 1.5  # times the least strength at which a spike leaves the bulk (Baik, Ben Arous and Peche 2005)
SPIKES = (1, 4)
NOISE = {"undertrained", "too few to say"}


def _pruned(weight: Any, share: float) -> np.ndarray:
    weight = np.asarray(weight)
    return np.where(np.abs(weight) < np.quantile(np.abs(weight), share), 0, weight)


def _rounded(weight: Any, group: int | None, levels: int) -> np.ndarray:
    """Return weights rounded to 2 `levels` + 1 values, scaled by groups of so many, or by outputs."""
    weight = np.asarray(weight)
    if group and weight.size % group == 0:
        groups, axis = weight.reshape(-1, group), 1
    else:
        groups, axis = weight.reshape(-1, weight.shape[-1]), 0
    scales = np.abs(groups).max(axis, keepdims=True) / levels
    return (np.round(groups / scales) * scales).reshape(weight.shape)


def _nf4(weight: Any) -> np.ndarray:
    """Return weights as bitsandbytes rounds them: by 64, to the nearest of 16 levels times their largest."""
    groups = _groups(np.asarray(weight), 64)
    levels = np.sort(NF4) / max(NF4)
    scales = np.abs(groups).max(1, keepdims=True)
    return (levels[np.abs(groups[..., None] / scales[..., None] - levels).argmin(-1)] * scales).reshape(weight.shape)


def _q4_0(weight: Any) -> np.ndarray:
    """Return weights as llama.cpp's Q4_0 rounds them: by 32, to 16 levels, the largest by magnitude one of them."""
    groups = _groups(np.asarray(weight), 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scales = (extreme / -8).astype(np.float16).astype(np.float32)
    return (np.clip(np.round(groups / scales), -8, 7) * scales).reshape(weight.shape)


def _groups(weight: np.ndarray, size: int) -> np.ndarray:
    """Return the weights in groups of so many, or of fewer where they do not divide into these."""
    return weight.reshape(-1, np.gcd(weight.size, size))


def _dead(weight: np.ndarray) -> float:
    """Return the share of inputs or outputs that pruning left without a weight."""
    used = weight.reshape(-1, *weight.shape[-2:]).any(0)
    return 1 - float(min(used.any(0).mean(), used.T.any(0).mean()))


def power_law(rng: np.random.Generator, shape: tuple[int, ...], exponent: float) -> np.ndarray:
    """Return a matrix whose eigenvalues are drawn from a power law, density x^-exponent, in random directions."""
    rows, cols = shape[-2:]
    left, right = (np.linalg.qr(rng.standard_normal((size, min(rows, cols))))[0] for size in (rows, cols))
    eigenvalues = rng.random(min(rows, cols)) ** (-1 / (exponent - 1))
    return ((left * eigenvalues**0.5) @ right.T).reshape(shape)


def spiked(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Return noise with so many directions, each `MARGIN` times as strong as the weakest that can be seen."""
    rows, cols = shape[-2:]
    left, right = (np.linalg.qr(rng.standard_normal((size, count)))[0] for size in (rows, cols))
    return (rng.standard_normal((rows, cols)) + MARGIN * (rows * cols) ** 0.25 * left @ right.T).reshape(shape)


def spiked_and_sparse(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Return the same in 10 % of the weights, whose rows have spikes by chance, with directions twice as strong."""
    kept = 0.1
    rows, cols = shape[-2:]
    strength = 2 * MARGIN * (rows * cols) ** 0.25 / kept**0.5
    left, right = (np.linalg.qr(rng.standard_normal((size, count)))[0] for size in (rows, cols))
    weight = rng.standard_normal((rows, cols)) + strength * left @ right.T
    return (weight * (rng.random((rows, cols)) < kept)).reshape(shape)


def _special(rng: np.random.Generator) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Yield kind, expected status, words of the reason and weight."""
    normal = rng.standard_normal
    dead = normal((128, 256))
    dead[:, rng.permutation(256)[:64]] = 0
    touched = np.where(np.arange(256) < 6, normal((128, 256)), 0)
    decayed = np.where(dead == 0, 1e-5, 1) * normal((128, 256))
    yield "low rank", "degenerate", "low rank: 16 of 128", normal((128, 16)) @ normal((16, 256))
    yield "rank one", "degenerate", "rank one", np.outer(normal(128), normal(256))
    yield "dead outputs", "degenerate", "64 of 256 outputs are zero", dead
    yield "outputs decayed to 1e-5", "degenerate", "64 of 256 outputs are zero, or 1000 times smaller", decayed
    yield "constant", "degenerate", "constant", np.full((128, 256), normal())
    yield "zero", "degenerate", "every weight is zero", np.zeros((128, 256))
    yield "repeated outputs", "degenerate", "only 64 of 256 outputs differ", np.repeat(normal((128, 64)), 4, axis=1)
    yield "identity", "flat", "the identity", np.eye(128)
    yield "identity and noise", "flat", "a multiple of the identity", np.eye(128) + 0.02 * normal((128, 128))
    yield "6 outputs touched", "degenerate", "250 of 256 outputs are zero", touched
    yield "a mean of one deviation", "spiked", "share a mean", 1 + normal((128, 256))


def _judged(layers: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    weights = {name: weight.astype(np.float32) for name, weight in layers.items()}
    diagnosis = diagnose(weights, axes=AXES, progress=True)
    return {row["layer"]: (row["status"], row["reason"]) for row in diagnosis.layers}


def random_layers(draws: int) -> list[dict[str, Any]]:
    """Diagnose `draws` layers of each initialiser and shape, and count what they are called."""
    results = []
    for shape, sizes in tqdm(SHAPES.items(), unit="shape", leave=False):
        # A few orthogonal vectors in hundreds of dimensions: noise is nearly that.
        kinds = [kind for kind in INITIALISERS if kind != "orthogonal" or shape not in FEW]
        layers = {}
        for kind in kinds:
            keys = jax.random.split(jax.random.key(zlib.crc32(f"{kind}, {shape}".encode())), draws)
            layers |= {f"{kind} {i}": np.asarray(INITIALISERS[kind](key, sizes)) for i, key in enumerate(keys)}
        found = _judged(layers)
        for kind in kinds:
            statuses = {name: found[name][0] for name in (f"{kind} {i}" for i in range(draws))}
            right = {"flat"} if kind == "orthogonal" else NOISE
            results.append({
                "initialiser": kind,
                "shape": shape,
                "layers": draws,
                "right": sum(
                    status in ({"degenerate"} if _dead(layers[name]) >= MISSING else right)
                    for name, status in statuses.items()
                ),
                "statuses": dict(Counter(statuses.values())),
            })
    return results


def planted(draws: int) -> list[dict[str, Any]]:
    """Diagnose `draws` layers of each planted structure, and count in how many it was found."""
    rng, results = np.random.default_rng(0), []
    kinds: list[tuple[str, Callable[..., np.ndarray], float]] = [
        *((f"power law, exponent {exponent}", power_law, exponent) for exponent in EXPONENTS),
        *((f"spikes, {count}", spiked, count) for count in SPIKES),
        *((f"spikes, {count}, in 10 % of the weights", spiked_and_sparse, count) for count in SPIKES),
    ]
    for kind, make, value in kinds:
        for shape in PLANTED:
            found = _judged({str(i): make(rng, SHAPES[shape], value) for i in range(draws)})
            results.append({
                "kind": kind,
                "shape": shape,
                "layers": len(found),
                "right": sum(status not in NOISE for status, _ in found.values()),
                "statuses": dict(Counter(status for status, _ in found.values())),
            })
    return results


def special(draws: int) -> list[dict[str, Any]]:
    """Diagnose `draws` layers of each special kind, and count those that are called what they are."""
    rng, right, statuses = np.random.default_rng(1), Counter[str](), {}
    for _ in range(draws):
        made = list(_special(rng))
        found = _judged({kind: weight for kind, _, _, weight in made})
        for kind, status, words, _ in made:
            right[kind] += found[kind][0] == status and words in found[kind][1]
            statuses.setdefault(kind, Counter()).update([found[kind][0]])
    return [
        {"kind": kind, "shape": "128 x 256", "layers": draws, "right": right[kind], "statuses": dict(counts)}
        for kind, counts in statuses.items()
    ]


def _line(row: dict[str, Any]) -> str:
    kind = row.get("initialiser") or row["kind"]
    return f"{kind:34} {row['shape']:26} {row['right']:3} of {row['layers']:3} right  {row['statuses']}"


def _share(results: list[dict[str, Any]]) -> float:
    return sum(row["right"] for row in results) / sum(row["layers"] for row in results)


def main() -> None:
    """Print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8, help="layers of each kind and shape")
    parser.add_argument("--json", default="benchmarks/results/false_verdicts.json")
    args = parser.parse_args()
    parts = {"random": random_layers(args.draws), "planted": planted(args.draws), "special": special(args.draws)}
    for part, results in parts.items():
        for row in results:
            print(_line(row))
        print(f"{part}: {sum(row['layers'] for row in results)} layers, {_share(results):.1%} right")
        worst = [row for row in results if row["right"] < row["layers"]]
        for row in sorted(worst, key=lambda row: row["right"] / row["layers"]):
            print(f"  not all: {_line(row)}")
    write(args.json, {"machine": machine(), "draws": args.draws, **parts})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
