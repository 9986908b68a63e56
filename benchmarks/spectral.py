"""Spectral analysis of whole networks: ours against a plain PyTorch loop and against WeightWatcher.

    python -m benchmarks.spectral [--networks resnet18 vgg16] [--repeats 5] [--json results.json]

Per network, at full width, in one run with equal threads, interleaved:

- `ours`: `farms_jax.analyze`, rules `median` and `peak`; the first call, with an empty cache, beside it;
- `loop`: the same windows, one `torch.linalg.svdvals` each, the fit in a plain loop over candidates (`peak`);
- `whole`: our analysis of whole matrices, what FARMS costs beyond the baseline;
- `weightwatcher`: `WeightWatcher(model).analyze()` with its defaults: whole matrices, its own power-law fit.

The alphas are compared as well: ours in float32 with the loop's in float64 (in float32 the loop's own `peak` may fall
into another bin of its histogram, by rounding).
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from tqdm import tqdm

import farms_jax
from benchmarks._common import interleave, machine, timed, write
from train.models import MODELS

WINDOW = farms_jax.Window(per_axis=9)


def network(name: str) -> dict[str, np.ndarray]:
    """Kernels of a network at full width with 100 classes, in Torch's orientation, by name."""
    params = nnx.state(MODELS[name].build(num_classes=100, width=1.0, rngs=nnx.Rngs(0)), nnx.Param)
    kernels = {key: np.asarray(leaf) for key, leaf in farms_jax.named_leaves(params) if leaf.ndim in {2, 4}}
    return {key: torch_layout(kernel) for key, kernel in kernels.items()}


def torch_layout(kernel: np.ndarray) -> np.ndarray:
    """A Flax kernel (..., in, out) in Torch's orientation (out, in, ...)."""
    return (kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)).copy()


def cut(weight: torch.Tensor) -> list[list[torch.Tensor]]:
    """Windows of a weight, division by division."""
    if weight.ndim == 2:
        rows, cols = weight.shape
        size = min(rows, cols)
        step = max(1, (max(rows, cols) - size) // 8)
        starts = [i * step for i in range(min(9, (max(rows, cols) - size) // step + 1))]
        return [[weight[s : s + size] if rows > cols else weight[:, s : s + size] for s in starts]]
    matrices = [weight[:, :, i, j] for i in range(weight.shape[2]) for j in range(weight.shape[3])]
    matrices = [matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T for matrix in matrices]
    size = matrices[0].shape[1]
    return [
        [matrix[i * size : (i + 1) * size] * 0.5**0.5 for matrix in matrices]
        for i in range(matrices[0].shape[0] // size)
    ]


def fit(values: torch.Tensor, rule: str) -> float:
    """Alpha of an ascending spectrum, one candidate after the other."""
    logs, count = values.log(), len(values)
    if rule == "median":
        i = count // 2
        return float(1 + (count - i) / (logs[i:] - logs[i]).sum())
    least, most = bounds(values)
    best, best_alpha = 2.0, 0.0
    for i in range(count - 1):
        if values[i] < least or values[i] > most:
            continue
        alpha, distance = at_candidate(values, logs, i)
        if distance < best:
            best, best_alpha = float(distance), float(alpha)
    return best_alpha


def bounds(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which eigenvalues of an ascending spectrum the `peak` rule looks for a threshold."""
    log10 = values.log10()
    counts = torch.histc(log10, 100)
    peak = 10 ** (log10[0] + counts.argmax() * (log10[-1] - log10[0]) / 100)
    return (0.95 * peak).log10(), 1.5 * peak


def at_candidate(values: torch.Tensor, logs: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and KS distance of the tail from an index on."""
    n = len(values) - i
    alpha = 1 + n / (logs[i:].sum() - n * logs[i])
    distances = 1 - (values[i:] / values[i]) ** (1 - alpha) - torch.arange(n, device=values.device) / n
    return alpha, distances.abs().max()


def torch_loop(weights: dict[str, torch.Tensor], rule: str) -> list[float]:
    """Alpha of every layer by a plain loop over windows."""
    alphas = []
    for weight in weights.values():
        spectra = [torch.cat([torch.linalg.svdvals(window) ** 2 for window in windows]) for windows in cut(weight)]
        alphas.append(float(np.mean([fit(spectrum.sort().values, rule) for spectrum in spectra])))
    return alphas


def exact_alphas(weights: dict[str, torch.Tensor], rule: str) -> list[float]:
    """Alpha of every layer by the plain loop, float64; on one thread, as its time is not taken.

    Beside a busy core the OpenMP threads of Torch's LAPACK spin: the loop then stands for minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch_loop({name: weight.double() for name, weight in weights.items()}, rule)
    finally:
        torch.set_num_threads(threads)


def torch_module(weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """The same weights as Torch layers, for WeightWatcher."""
    layers = []
    for weight in weights.values():
        rows, cols, *kernel = weight.shape
        layer = torch.nn.Conv2d(cols, rows, tuple(kernel), bias=False) if kernel else torch.nn.Linear(cols, rows, False)
        layer.weight.data = torch.from_numpy(weight)
        layers.append(layer)
    return torch.nn.Sequential(*layers)


def measure(name: str, repeats: int, *, peers: bool) -> dict[str, Any]:
    """Times of one network, in seconds, and ratios peer / ours."""
    weights = network(name)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    theirs = {key: torch.from_numpy(weight).to(device) for key, weight in weights.items()}
    ours = {key: jax.numpy.asarray(weight) for key, weight in weights.items()}
    result: dict[str, Any] = {}

    def analyze(window: farms_jax.Window | None, rule: Any) -> np.ndarray:
        report = farms_jax.analyze(ours, window=window, tail=farms_jax.Tail(rule), axes=farms_jax.TORCH_AXES)
        return np.asarray(report.alpha)

    for rule in ("median", "peak"):
        found, first = timed(lambda rule=rule: analyze(WINDOW, rule))
        alphas = dict(zip(sorted(weights, key=farms_jax.natural_key), found, strict=True))
        runs: dict[str, Any] = {
            "ours": lambda rule=rule: analyze(WINDOW, rule),
            "whole": lambda rule=rule: analyze(None, rule),
        }
        if rule == "median":
            runs["loop"] = lambda: torch_loop(theirs, "median")
        median = {key: statistics.median(values) for key, values in interleave(runs, repeats).items()}
        if rule == "peak":  # so slow that once must do
            _, median["loop"] = timed(lambda: torch_loop(theirs, "peak"))
        reference = exact_alphas(theirs, rule)
        difference = [abs(alphas[key] / alpha - 1) for key, alpha in zip(weights, reference, strict=True)]
        result[rule] = {"first": first, **median, "ratio": median["loop"] / median["ours"]}
        result[rule]["max_relative_difference_of_alpha"] = float(max(difference))
    if peers:
        result["weightwatcher"] = time_weightwatcher(weights)
        result["ratio_weightwatcher"] = result["weightwatcher"] / result["median"]["whole"]
    return result


def time_weightwatcher(weights: dict[str, np.ndarray]) -> float:
    """Seconds of one default analysis."""
    import weightwatcher

    module = torch_module(weights)
    return timed(lambda: weightwatcher.WeightWatcher(model=module).analyze())[1]


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet34", "vgg16", "vgg19"], choices=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-weightwatcher", action="store_true")
    parser.add_argument("--json", default="benchmarks/results/spectral.json")
    settings = parser.parse_args()
    facts = machine()
    torch.set_num_threads(facts["cores"])
    results = {}
    for name in tqdm(settings.networks, unit="network"):
        results[name] = measure(name, settings.repeats, peers=not settings.no_weightwatcher)
    print(f"\n{facts['cpu']}, {facts['cores']} cores, {facts['device']}; seconds, medians of {settings.repeats}")
    print(
        f"{'network':10} {'rule':7} {'first':>7} {'ours':>7} {'loop':>8} {'ratio':>7} {'whole':>7} {'difference':>11}"
    )
    for name, result in results.items():
        for rule in ("median", "peak"):
            row = result[rule]
            print(
                f"{name:10} {rule:7} {row['first']:7.2f} {row['ours']:7.3f} {row['loop']:8.3f} {row['ratio']:6.1f}x "
                f"{row['whole']:7.3f} {row['max_relative_difference_of_alpha']:11.1e}"
            )
        if "weightwatcher" in result:
            times = f"{result['weightwatcher']:.1f} s, {result['ratio_weightwatcher']:.0f}x our whole-matrix analysis"
            print(f"{name:10} weightwatcher {times}")
    write(settings.json, {"machine": facts, "repeats": settings.repeats, "seconds": results})
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
