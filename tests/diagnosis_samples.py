"""Made-up diagnoses, with every kind of layer, for tests of how they are shown."""

import dataclasses

import numpy as np

from farms_jax.diagnosis.columns import COLUMNS, MEDIAN
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.settings import Settings
from farms_jax.diagnosis.spectrum import Histogram

KINDS = {"down_proj": (576, 1536), "k_proj": (192, 576), "q_proj": (576, 576), "up_proj": (1536, 576)}
NOISE = 2.13
HOSTILE = 'model.layers.0.<b>&"quoted"</b>'
ALPHAS = ("alpha", "alpha_low", "alpha_high", "xmin", "whole_alpha", "aspect_ratio_bias", "ww_alpha", "ww_xmin")


def diagnosis(blocks=4, model="SmolLM2 <135M>"):
    """Blocks of four layers; the last layer is degenerate, others of every status among them."""
    rng = np.random.default_rng(0)
    layers = [_row(i, 4 * blocks, rng) for i in range(4 * blocks)]
    for rank, row in enumerate(sorted(layers, key=lambda row: row["alpha"] or np.inf), start=1):
        row |= {"rank": rank, "rank_low": max(1, rank - 2), "rank_high": min(len(layers), rank + 2)}
    facts = {"path": "/models/smol/model.safetensors", "weights_sha256": "ab" * 32, "versions": {"jax": "0.10.2"}}
    left_out = [(f"model.layers.{i}.norm.weight", "1 axes: only 2-D weights are layers") for i in range(blocks)]
    return Diagnosis(
        model=model,
        layers=tuple(layers),
        left_out=(*left_out, ("lm_head.weight", "excluded")),
        settings=dataclasses.asdict(Settings()) | {"axes": {"rows": 0, "cols": 1}},
        facts=facts,
        histograms={row["layer"]: _histogram(rng) for row in layers},
    )


def _histogram(rng):
    edges = np.linspace(-3, 2.5, 61)
    bulk, tail = rng.normal(0, 0.35, 3000), 0.2 + rng.exponential(0.35, 800)
    spectra = [*bulk, *tail], [*(bulk[:500] + 0.5), *(tail[:60] + 0.9)]
    densities = [np.histogram(values, edges, density=True)[0] for values in spectra]
    return Histogram(*(tuple(values.tolist()) for values in (edges, *densities)))


def _row(i, count, rng):
    kind, shape = list(KINDS.items())[i % len(KINDS)]
    alpha, status = 1.45 + 0.5 * i / count + 0.15 * rng.random(), "well trained"
    if i % 7 == 3:
        alpha, status = 2.1 + 0.05 * rng.random(), "undertrained"
    if i % 11 == 5:
        status = "over-correlated"
    shorter, longer = sorted(shape)
    row = {column.name: float(rng.random() * 100) for column in COLUMNS if column.format}
    row |= {column.name: int(row[column.name]) for column in COLUMNS if column.format.endswith("d")}
    row = {name: value for name, value in row.items() if name not in MEDIAN.values()}
    row |= {"layer": f"model.layers.{i // len(KINDS)}.self_attn.{kind}.weight" if i else HOSTILE, "noise_alpha": NOISE}
    row |= {"type": kind.removesuffix("_proj"), "place": i + 1}
    row |= {"status": status, "reason": f"why it is {status}", "shape": f"{shape[0]}x{shape[1]}"}
    row |= {"zeros": 0.0, "num_params": longer * shorter, "N": longer, "M": shorter, "Q": longer / shorter}
    if i == count - 1:
        row |= {"status": "degenerate", "reason": "constant: every weight is 1", "rand_distance": float("nan")}
        return row | dict.fromkeys((*ALPHAS, "sv_min"))
    bias = 1.1 * np.log2(longer / shorter) + 0.1 * rng.random()
    values = (alpha, alpha - 0.03, alpha + 0.05, 1.6, alpha + bias, bias, alpha + bias + 1.2, 9.0)
    return row | dict(zip(ALPHAS, values, strict=True))
