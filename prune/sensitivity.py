"""Sensitivity: how far the dense model is off when one block, or one layer, of it is pruned and nothing else."""

import dataclasses
import hashlib
import json
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from farms_jax.errors import InputError, listed
from farms_jax.programs.cache import Cache

from .allocation import plan_of, sizes_of, units_of
from .job import Job
from .levels import build_levels, level_config
from .variants import divergences, run_variants, variant_of

_LEAST = 1e-3  # of the largest: a sensitivity below is noise, and its logarithm would decide over all others
_TOGETHER = 32  # variants whose activations are held at once
_FORMAT = 1  # of what the cache holds


def score_by_sensitivity(job: Job) -> dict[str, float]:
    """Return minus the logarithm of each layer's sensitivity per weight: high means unimportant.

    Layers that share a sparsity share the score. Under the rule `"shift"` it minimises a sum of predicted losses: if
    the loss of unit u with n_u weights at sparsity s is L_u exp(a (s - target)), the sum under a budget of weights is
    lowest where L_u / n_u exp(a s_u) is the same everywhere, that is s_u = c - log(L_u / n_u) / a. Epsilon stands for
    a: half the range of the logarithms over it. Sparsities never rise with sensitivity per weight.
    """
    found, units = measured_sensitivity(job), units_of(job.config, job.network.layer_shapes())
    sizes, least = sizes_of(job.network.layer_shapes()), _LEAST * max(found.values())
    scores = {}
    for unit, layers in units.items():
        per_weight = max(found[unit], least) / sum(sizes[layer] for layer in layers)
        scores |= dict.fromkeys(layers, -math.log(per_weight) if least > 0 else 0.0)
    return scores


def measured_sensitivity(job: Job) -> dict[str, float]:
    """Return the sensitivity of each unit by name: blocks, or layers under that granularity.

    It is KL(dense || pruned) in nats, the mean over the tokens of a quarter as many held-out calibration sequences as
    there are `samples`, when that unit alone is pruned by the run's method to its target. All units are pruned in one
    pass over the dense model, and go through it 32 at a time, with one block in memory; the result is cached.

    Raises:
        InputError: one is not finite.
    """
    config, network, shapes = job.config, job.network, job.network.layer_shapes()
    uniform = dataclasses.replace(level_config(config), allocation="uniform")
    plan = plan_of(uniform, dict.fromkeys(shapes, config.target), shapes)
    units, ids = units_of(config, shapes), job.unseen[: max(config.samples // 4, 1)]
    store, key = Cache(config.out / "cache" / "sensitivity"), _key(job, len(ids))
    if (known := store.get(key)) is not None:
        return known["divergence"]
    folder = config.spill or config.out / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        levels = build_levels(job, [plan], Path(scratch), "prune for sensitivity")
        names = list(units)
        for start in tqdm(range(0, len(names), _TOGETHER), desc="sensitivity", leave=False):
            chosen = names[start : start + _TOGETHER]
            variants = [variant_of(network, dict.fromkeys(units[unit], 0)) for unit in chosen]
            *outputs, dense = run_variants(job, levels, [*variants, variant_of(network, {})], ids, "sensitivity")
            found |= dict(zip(chosen, divergences(job, dense, outputs).mean(1).tolist(), strict=True))
    if wrong := [unit for unit, value in found.items() if not math.isfinite(value)]:
        raise InputError(f"--allocation {config.allocation}: pruning {listed(wrong, 8, ', ')} alone gives NaN or Inf")
    store.put(key, {"divergence": found})
    return found


def _key(job: Job, sequences: int) -> str:
    """Return the hash of all that the sensitivities depend on."""
    config = job.config
    facts = [
        _FORMAT,
        job.weights,
        job.calibration.record["ids_sha256"],
        config.samples,
        sequences,
        level_config(config).method,
    ]
    facts += [
        config.target,
        config.groups,
        level_config(config).damping,
        config.granularity,
        config.dtype,
        version("farms-jax"),
        version("jax"),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
