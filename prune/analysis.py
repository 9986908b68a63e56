"""Alphas of a model's layers, one block in memory at a time, kept by the hash of the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import farms_jax
from farms_jax.programs.cache import Cache, weights_key

from .models import Network
from .walk import Read, weights_of

Measures = dict[str, dict[str, Any]]


def measure(
    network: Network, read: Read, window: farms_jax.Window | None, tail: farms_jax.Tail, cache: Path, title: str
) -> Measures:
    """Analyse the linears of all blocks.

    Args:
        network: the model.
        read: gives the tensors of a block.
        window: of the analysis; `None`: whole matrices.
        tail: of the analysis.
        cache: folder of earlier results; what was measured before on the same weights is not measured again.
        title: of the progress bar.

    Returns:
        `LayerReport.to_dict` of every layer, in network order.
    """
    measures: Measures = {}
    store = Cache(cache)
    for block in tqdm(range(network.num_blocks), desc=title, unit="block"):
        weights = weights_of(network, block, read(block))
        key = weights_key(weights, farms_jax.__version__, window, tail)
        rows = store.get(key)
        if rows is None:
            report = farms_jax.analyze(weights, window=window, tail=tail, axes=farms_jax.TORCH_AXES)
            rows = {name: report.to_dict()[name] for name in weights if name in report.names}
            store.put(key, rows)
        measures |= rows
    return measures


def alphas_of(measures: Measures, layers: Mapping[str, int]) -> dict[str, float]:
    """Return the alpha of every layer; where there is no tail, or too few eigenvalues, the mean of the others."""
    found = {layer: measures[layer]["alpha"] if layer in measures else 0.0 for layer in layers}
    fitted = [alpha for alpha in found.values() if alpha > 0]
    mean = float(np.mean(fitted)) if fitted else 1.0
    return {layer: alpha if alpha > 0 else mean for layer, alpha in found.items()}
