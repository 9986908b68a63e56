"""Made-up diagnoses, with every kind of layer, for tests of how they are shown."""

import dataclasses

import numpy as np

from farms_jax.diagnosis.columns import COLUMNS
from farms_jax.diagnosis.diagnosis import Diagnosis, Histogram
from farms_jax.diagnosis.settings import Settings

KINDS = {"q_proj": (576, 576), "k_proj": (192, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
NOISE = 2.13
HOSTILE = 'model.layers.0.<b>&"quoted"</b>'


def diagnosis(blocks=4, bins=60, model="SmolLM2 <135M>", seed=0):
    """Blocks of four layers; the last layer is degenerate, others of every status among them."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.self_attn.{kind}.weight" for i in range(blocks) for kind in KINDS]
    names[0] = HOSTILE
    layers, histograms = [], {}
    for i, name in enumerate(names):
        shape = list(KINDS.values())[i % len(KINDS)]
        histogram, windows = _histogram(rng, bins)
        alpha = 1.45 + 0.5 * i / len(names) + 0.15 * rng.random()
        status, reason = "well trained", f"alpha {alpha:.2f} of the windows is below that of noise, {NOISE:.2f}"
        if i % 7 == 3:
            alpha, status, reason = 2.1 + 0.05 * rng.random(), "undertrained", f"alpha is that of noise, {NOISE:.2f}"
        if i % 11 == 5:
            status, reason = "over-correlated", "alpha 1.71 of the whole matrix is below 2"
        if i == len(names) - 1:
            alpha, status, reason = 0.0, "degenerate", "rank 1 of 576: constant"
        layers.append(_row(name, shape, alpha, status, reason, rng, windows))
        histograms[name] = histogram
    order = np.argsort([row["alpha"] for row in layers])
    for rank, i in enumerate(order, start=1):
        low, high = max(1, rank - 2), min(len(layers), rank + 2)
        layers[i] |= {"rank": rank, "rank_low": low, "rank_high": high, "rank_flips": float(rng.random())}
    settings = dataclasses.asdict(Settings()) | {"axes": {"rows": 0, "cols": 1}}
    facts = {"path": "/models/smol/model.safetensors", "format": "safetensors", "weights_sha256": "ab" * 32}
    facts |= {"date": "2026-11-22 08:00:00 UTC", "seconds": 41.7, "versions": {"farms-jax": "0.1.0", "jax": "0.10.2"}}
    left_out = [(f"model.layers.{i}.norm.weight", "1 axes: only 2-D weights are layers") for i in range(blocks)]
    left_out.append(("lm_head.weight", "excluded"))
    return Diagnosis(
        model=model,
        layers=tuple(layers),
        left_out=tuple(left_out),
        settings=settings,
        facts=facts,
        histograms=histograms,
    )


def _histogram(rng, bins):
    edges = np.linspace(-3, 2.5, bins + 1)
    width = edges[1] - edges[0]
    bulk, tail = rng.normal(0, 0.35, 3000), 0.2 + rng.exponential(0.35, 800)
    windows = np.histogram(np.concatenate([bulk, tail]), edges)[0]
    whole = np.histogram(np.concatenate([bulk[:500] + 0.5, tail[:60] + 0.9]), edges)[0]
    windows, whole = windows / windows.sum() / width, whole / whole.sum() / width
    return Histogram(tuple(edges.tolist()), tuple(windows.tolist()), tuple(whole.tolist())), windows


def _row(name, shape, alpha, status, reason, rng, windows):
    longer, shorter = max(shape), min(shape)
    whole = alpha and alpha + 1.1 * np.log2(longer / shorter) + 0.1 * rng.random()
    row = {column.name: float(rng.random() * 100) for column in COLUMNS if column.format}
    row |= {column.name: int(row[column.name]) for column in COLUMNS if column.format == "d"}
    row |= {"layer": name, "status": status, "reason": reason, "shape": shape, "num_params": longer * shorter}
    row |= {"N": longer, "M": shorter, "Q": longer / shorter, "alpha": alpha, "noise_alpha": NOISE}
    row |= {"alpha_low": alpha and alpha - 0.03, "alpha_high": alpha and alpha + 0.05, "xmin": 1.6}
    row |= {
        "ks_distance": 0.05,
        "whole_alpha": whole,
        "aspect_ratio_bias": whole - alpha,
        "ww_alpha": whole + 1.2,
        "ww_xmin": 9.0,
    }
    return row | ({"sv_min": None, "rand_distance": float("nan")} if status == "degenerate" else {})
