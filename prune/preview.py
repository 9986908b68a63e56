"""A dry run: the allocation and the size of the model that it would give, of as little work as that takes."""

import dataclasses

from .allocation import plan_of, sparsities
from .config import EPSILON
from .job import Job
from .results import allocation_table
from .scores import score_layers, spectral_alphas


def preview(job: Job) -> str:
    """Return the table of the allocation; weights are measured, and calibration text is read, where it needs them.

    Nothing is written but the cache of alphas, which saves a run their measurement. What a run finds by pruning is left
    to it: the default stands for an epsilon that is searched, `ends` for the allocation by sensitivity; a search is
    refused before (`Config.check`).
    """
    config, note = job.config, ""
    if config.allocation == "sensitivity":
        note = f"\n--allocation {config.allocation} prunes to find out, so it is left to the run; this is `ends`"
        job = dataclasses.replace(job, config=dataclasses.replace(config, allocation="ends", epsilon=None))
    elif config.half_range() is None:
        epsilon = EPSILON[config.allocation]
        note = f"\n--epsilon auto is searched by the run; this is the allocation at {epsilon:g}"
        job = dataclasses.replace(job, config=dataclasses.replace(config, epsilon=str(epsilon)))
    config, shapes, epsilon = job.config, job.network.layer_shapes(), job.config.half_range()
    assert epsilon is not None  # only `auto` has none
    scores = score_layers(job, spectral_alphas(job, job.checkpoint, "alphas"))
    plan = plan_of(config, sparsities(config, scores, shapes, epsilon), shapes)
    return allocation_table(job, scores, epsilon, plan) + note
