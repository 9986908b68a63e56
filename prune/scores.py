"""The score of every layer, by the rule of the allocation: how dispensable its weights are."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import farms_jax
from farms_jax._sparsity import impute_alphas
from farms_jax.programs.cache import Cache, weights_key

from .allocation import sparsities
from .checkpoints import Checkpoint
from .config import EPSILON, SPECTRAL
from .forward import Read, Statistics, Tensors, embed, read_part, run_blocks, weights_of
from .job import Job
from .methods import lowest, wanda_scores
from .models import Network
from .sensitivity import score_by_sensitivity

OUTLIER = 5.0  # OWL's M: an outlier is a score above this multiple of the mean


def spectral_alphas(job: Job, checkpoint: Checkpoint, title: str) -> dict[str, float]:
    """Return alpha by layer, 0 where there is no tail; empty where the allocation does not use alphas."""
    config, network = job.config, job.network
    if config.allocation not in SPECTRAL:
        return {}
    window = config.window(min(min(shape) for shape in network.layer_shapes().values()))
    return measure_alphas(
        network, checkpoint.read, window, farms_jax.Tail(config.tail), config.out / "cache" / "alphas", title
    )


def measure_alphas(
    network: Network, read: Read, window: farms_jax.Window | None, tail: farms_jax.Tail, cache: Path, title: str
) -> dict[str, float]:
    """Return the alpha of every linear of all blocks, in network order, with one block in memory at a time.

    0 where there is no tail; layers with too few eigenvalues are left out. `window=None` analyses whole matrices. The
    folder `cache` holds earlier reports, so that the same weights are not measured twice.
    """
    alphas: dict[str, float] = {}
    store = Cache(cache)
    for block in tqdm(range(network.num_blocks), desc=title, unit="block"):
        weights = weights_of(network, block, read_part(network, block, read))
        key = weights_key(weights, farms_jax.__version__, window, tail)
        measures = store.get(key)
        if measures is None:
            measures = farms_jax.analyze(weights, window=window, tail=tail, axes=farms_jax.TORCH_AXES).to_dict()
            store.put(key, measures)
        alphas |= {layer: measures[layer]["alpha"] for layer in weights if layer in measures}
    return alphas


def allocate(job: Job, scores: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the sparsity of each layer, with the default epsilon; `scores` are found if not known yet."""
    config, shapes = job.config, job.network.layer_shapes()
    return sparsities(
        config, score_layers(job) if scores is None else scores, shapes, EPSILON.get(config.allocation, 0.0)
    )


def score_layers(job: Job, alphas: dict[str, float] | None = None) -> dict[str, float]:
    """Return the score of each layer of the dense model; empty for uniform and search.

    `alphas` are measured if not known yet.

    References:
        Huang et al., Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective,
        ICML 2025 (ATP): an arithmetic progression of sparsities.
    """
    config, network = job.config, job.network
    layers = network.layer_shapes()
    if config.allocation in SPECTRAL:
        known = spectral_alphas(job, job.checkpoint, f"{config.allocation} scores") if alphas is None else alphas
        filled = impute_alphas(np.array([known.get(layer, 0.0) for layer in layers]))
        return dict(zip(layers, filled.tolist(), strict=True))
    if config.allocation in {"atp", "ends"}:
        return _score_by_depth(job)
    if config.allocation == "sensitivity":
        return score_by_sensitivity(job)
    return _score_by_activations(job) if config.allocation in {"owl", "dlp"} else {}


def _score_by_depth(job: Job) -> dict[str, float]:
    """Return scores by the number of the block alone: the number (ATP), or 0 for the first and the last, 1 between."""
    network, last = job.network, job.network.num_blocks - 1

    def score(block: int) -> float:
        return float(block) if job.config.allocation == "atp" else float(0 < block < last)

    return {network.layer_name(block, linear): score(block) for block in range(last + 1) for linear in network.linears}


def _score_by_activations(job: Job) -> dict[str, float]:
    """Return scores by Wanda's scores in the dense model, over the calibration sequences; high means unimportant.

    OWL takes minus the percentage of scores above five times their mean; DLP takes their median (its paper; its
    code takes the mean). The granularity says whether over the block together, or layer by layer.

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity, ICML 2024; Chen et al., DLP: Dynamic Layerwise Pruning in
        Large Language Models, ICML 2025.
    """
    config, network, scores = job.config, job.network, {}
    summary = _outliers if config.allocation == "owl" else _median

    def visit(block: int, tensors: Tensors, squares: Statistics) -> None:
        weights = weights_of(network, block, tensors).items()
        found = {layer: wanda_scores(jnp.asarray(weight), squares[layer]).ravel() for layer, weight in weights}
        if config.granularity == "block":
            scores.update(dict.fromkeys(found, float(summary(jnp.concatenate(list(found.values()))))))
        else:
            scores.update({layer: float(summary(values)) for layer, values in found.items()})

    read, title = job.checkpoint.read, f"{config.allocation} scores"
    activations = embed(network, read, job.seen, config.spill)
    run_blocks(network, read, activations, title=title, visit=visit, statistic="squares", calibration=len(activations))
    return scores


@jax.jit
def _outliers(scores: Array) -> Array:
    return -100 * (scores > OUTLIER * scores.mean()).mean(dtype=jnp.float32)


@jax.jit
def _median(scores: Array) -> Array:
    """Return the lower median, as torch does."""
    return jnp.where(lowest(scores, (scores.size - 1) // 2), scores, 0).max()
