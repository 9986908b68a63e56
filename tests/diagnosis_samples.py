"""Made-up diagnoses, with every kind of layer, for tests of how they are shown."""

import dataclasses

import numpy as np

from farms_jax.diagnosis.columns import COLUMNS
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import Histogram

KINDS = {"down_proj": (576, 1536), "k_proj": (192, 576), "q_proj": (576, 576), "up_proj": (1536, 576)}
NOISE = 2.13
HOSTILE = 'model.layers.0.<b>&"quoted"</b>'


def diagnosis(blocks=4, model="SmolLM2 <135M>", seed=0):
    """Blocks of four layers; the last layer is degenerate, others of every status among them."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.self_attn.{kind}.weight" for i in range(blocks) for kind in KINDS]
    names[0] = HOSTILE
    layers, histograms = [], {}
    for i, name in enumerate(names):
        shape = list(KINDS.values())[i % len(KINDS)]
        alpha = 1.45 + 0.5 * i / len(names) + 0.15 * rng.random()
        status, reason = "well trained", f"alpha {alpha:.2f} of the windows is below that of noise, {NOISE:.2f}"
        if i % 7 == 3:
            alpha, status, reason = 2.1 + 0.05 * rng.random(), "undertrained", f"alpha is that of noise, {NOISE:.2f}"
        if i % 11 == 5:
            status, reason = "over-correlated", "alpha 1.71 of the whole matrix is below 2"
        if i == len(names) - 1:
            alpha, status, reason = None, "degenerate", "rank 1 of 576: constant"
        layers.append(_row(name, shape, alpha, status, reason, rng))
        histograms[name] = _histogram(rng)
    order = np.argsort([row["alpha"] or np.inf for row in layers])
    for rank, i in enumerate(order, start=1):
        low, high = max(1, rank - 2), min(len(layers), rank + 2)
        layers[i] |= {"rank": rank, "rank_low": low, "rank_high": high, "rank_flips": float(rng.random())}
    settings = dataclasses.asdict(Settings()) | {"axes": {"rows": 0, "cols": 1}}
    facts = {"path": "/models/smol/model.safetensors", "format": "safetensors", "weights_sha256": "ab" * 32}
    facts |= {"date": "2026-11-22 08:00:00 UTC", "seconds": 41.7, "versions": {"farms-jax": "0.1.0", "jax": "0.10.2"}}
    left_out = [(f"model.layers.{i}.norm.weight", "1 axes: only 2-D weights are layers") for i in range(blocks)]
    left_out.append(("lm_head.weight", "excluded"))
    found = {"layers": tuple(layers), "left_out": tuple(left_out), "histograms": histograms}
    return Diagnosis(model=model, settings=settings, facts=facts, **found)


def _histogram(rng, bins=60):
    edges = np.linspace(-3, 2.5, bins + 1)
    bulk, tail = rng.normal(0, 0.35, 3000), 0.2 + rng.exponential(0.35, 800)
    densities = [
        np.histogram(values, edges, density=True)[0].tolist()
        for values in ([*bulk, *tail], [*(bulk[:500] + 0.5), *(tail[:60] + 0.9)])
    ]
    return Histogram(tuple(edges.tolist()), *map(tuple, densities))


def _row(name, shape, alpha, status, reason, rng):
    longer, shorter = max(shape), min(shape)
    row = {column.name: float(rng.random() * 100) for column in COLUMNS if column.format}
    row |= {column.name: int(row[column.name]) for column in COLUMNS if column.format == "d"}
    row |= {"layer": name, "status": status, "reason": reason, "shape": f"{shape[0]}x{shape[1]}"}
    row |= {"num_params": longer * shorter, "N": longer, "M": shorter, "Q": longer / shorter, "noise_alpha": NOISE}
    alphas = ("alpha", "alpha_low", "alpha_high", "xmin", "whole_alpha", "aspect_ratio_bias", "ww_alpha", "ww_xmin")
    if alpha is None:
        return row | dict.fromkeys((*alphas, "sv_min")) | {"rand_distance": float("nan")}
    bias = 1.1 * np.log2(longer / shorter) + 0.1 * rng.random()
    values = (alpha, alpha - 0.03, alpha + 0.05, 1.6, alpha + bias, bias, alpha + bias + 1.2, 9.0)
    return row | {"ks_distance": 0.05} | dict(zip(alphas, values, strict=True))
