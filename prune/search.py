"""A search for the allocation: the best of the cheap ones, and an evolution from there.

    1. Every other allocation prunes the model as it would be pruned (without recovery), and is judged on calibration
       text that no statistic saw, by its perplexity; so are the means of the best two and of the best three.
    2. The units (blocks, or layers) are pruned once each to levels around the best one, `prune/levels.py`. A generation
       is a number of offspring of the best allocation so far: a few random swaps, each of which moves the same number
       of removed weights from one unit to another, so that the budget is kept exactly. They are ranked by their
       divergence from the dense model on a growing share of the held-out text, and the last one left takes the place
       of its parent if it is better on all of it.
    3. What was found prunes the model as it would be pruned. The best of all by held-out perplexity is the result, so
       that it is never worse there than any allocation that it began with.

Every step is on record when it is done. A generation depends on the seed, its number and its parent alone, so a search
that was stopped finds the same as one that was not; how many generations fit in a number of minutes is not repeatable.

References:
    Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, ICML 2025,
    arXiv:2410.14649: level switch mutation, multi-step selection by KL divergence.
"""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from farms_jax._sparsity import HIGHEST

from .allocation import Shapes, plan_of, sizes_of, units_of
from .config import Allocation, Config
from .forward import Activations, NotFiniteError
from .job import Job
from .levels import Levels, build_levels, level_config
from .pruning import judge
from .record import Record
from .scores import allocate
from .variants import divergences, run_variants, variant_of

# Allocations that a search begins with, and their settings.
STARTS: dict[str, tuple[Allocation, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "ends": ("ends", {}),
    "atp": ("atp", {}),
    "dlp": ("dlp", {}),
    "owl": ("owl", {}),
    "alphapruning": ("alphapruning", {}),
    **{f"farms {tail}": ("farms", {"tail": tail}) for tail in ("median", "peak", "ks")},
    "sensitivity": ("sensitivity", {}),
}
MIXED = (2, 3)  # so many of the best are averaged
EVOLVED = "evolved"

OFFSPRING = 12  # in a generation
SELECTION = ((1 / 16, 4), (1 / 4, 1))  # share of the held-out text, and how many of the offspring it leaves
LEVELS = 4  # that a unit may go up, and down
STEP = 0.03  # of sparsity, from level to level, of a unit of the median size
_MOST_SWAPS = 3  # in one offspring


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The sparsities that each unit can have: that of the start, and whole steps from it."""

    units: Mapping[str, list[str]]  # layers by unit
    base: np.ndarray  # (units,) sparsity
    step: np.ndarray  # (units,) of sparsity
    moved: np.ndarray  # (units,) weights that a step removes
    lowest: np.ndarray  # (units,) steps below the base, 0 or less
    highest: np.ndarray  # (units,) steps above the base, 0 or more

    def sparsity(self, steps: np.ndarray) -> dict[str, float]:
        """Return the sparsity of each layer for steps (units,) from the base."""
        return self._by_layer(np.clip(self.base + steps * self.step, 0, HIGHEST))

    def levels(self, steps: np.ndarray) -> dict[str, int]:
        """Return the level of each layer, from 0, for steps (units,) from the base."""
        return self._by_layer(steps + LEVELS)

    def _by_layer(self, values: np.ndarray) -> dict[str, Any]:
        units = zip(self.units.values(), values.tolist(), strict=True)
        return {layer: value for layers, value in units for layer in layers}


def search(job: Job, record: Record) -> dict[str, float]:
    """Return the sparsity of each layer that a search finds; every step is on record, and not done again."""
    judged = judge_starts(job, record)
    ladder = ladder_of(job.config, judged[_ranked(judged)[0]]["sparsity"], job.network.layer_shapes())
    steps = evolve(job, ladder, record)
    if steps.any():
        judged = _judge(job, record, EVOLVED, lambda: ladder.sparsity(steps))
    ranked = _ranked(judged)
    tqdm.write("held-out perplexity: " + ", ".join(f"{name} {judged[name]['perplexity']:.4g}" for name in ranked))
    shutil.rmtree(record.path / "levels", ignore_errors=True)
    return judged[ranked[0]]["sparsity"]


def report(record: Record) -> dict[str, Any] | None:
    """Return what a search did, for the card: held-out perplexities, and each better allocation that evolved."""
    judged, state = record.get("judged"), record.get("evolution", {})
    if judged is None:
        return None
    perplexities = {name: found["perplexity"] for name, found in judged.items()}
    return {"held_out_perplexity": perplexities} | {key: state.get(key) for key in ("generation", "history")}


def judge_starts(job: Job, record: Record) -> dict[str, Any]:
    """Return, by name of the allocation, perplexity on the held-out text and sparsity of each layer."""
    judged = {}
    for name, (allocation, settings) in STARTS.items():
        config = dataclasses.replace(job.config, allocation=allocation, **settings)
        judged = _judge(job, record, name, functools.partial(allocate, dataclasses.replace(job, config=config)))
    ranked = _ranked({name: judged[name] for name in STARTS})
    for names in (ranked[:count] for count in MIXED):
        mixed = functools.partial(_mean, [judged[name]["sparsity"] for name in names])
        judged = _judge(job, record, " + ".join(names), mixed)
    return {name: found for name, found in judged.items() if name != EVOLVED}


def _mean(allocations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {layer: float(np.mean([one[layer] for one in allocations])) for layer in allocations[0]}


def _judge(job: Job, record: Record, name: str, allocate: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Return all that was judged, with one more allocation."""
    judged = dict(record.get("judged", {}))
    if name not in judged:
        sparsity = allocate()
        judged[name] = {"perplexity": judge(job, sparsity, name), "sparsity": sparsity}
        record.put("judged", judged)
    return record.get("judged")


def ladder_of(config: Config, sparsity: Mapping[str, float], shapes: Shapes) -> Ladder:
    """Return the sparsities around an allocation that have its budget's weights in whole steps.

    Every step moves the same number of weights. Under N:M a step is one of M, so that units of one size exchange them.
    """
    units, sizes, pattern = units_of(config, shapes), sizes_of(shapes), config.groups_of()
    weights = np.array([sum(sizes[layer] for layer in layers) for layers in units.values()], np.float64)
    if pattern:
        plan = plan_of(config, sparsity, shapes)
        sparsity = {layer: plan.asked(layer) for layer in shapes}
    base = np.array([sparsity[layers[0]] for layers in units.values()])
    step = np.full(len(base), 1 / pattern.size) if pattern else STEP * np.median(weights) / weights
    most = 1 - step if pattern else HIGHEST
    down = np.minimum(np.floor(base / step + 1e-9), LEVELS).astype(int)
    up = np.maximum(np.minimum(np.floor((most - base) / step + 1e-9), LEVELS), 0).astype(int)
    return Ladder(units, base, step, np.rint(step * weights).astype(int), -down, up)


def evolve(job: Job, ladder: Ladder, record: Record) -> np.ndarray:
    """Return the steps (units,) of the allocation that evolved; every generation is on record."""
    config, state = job.config, record.get("evolution")
    if state is None or not state["ended"]:
        levels = _build(job, ladder, record.path / "levels")
        dense = run_variants(job, levels, [variant_of(job.network, {})], job.unseen, "dense outputs")[0]
        if state is None:
            first = np.zeros(len(ladder.base), int)
            divergence = _divergences(job, levels, ladder, dense, [first], np.arange(len(job.unseen)))[0]
            state = {"generation": 0, "steps": first.tolist(), "divergence": divergence, "history": [], "seconds": 0.0}
        while not _ended(config, state):
            state = _next_generation(job, levels, ladder, dense, state)
            record.put("evolution", state | {"ended": False})
        record.put("evolution", state | {"ended": True})
    return np.array(record.get("evolution")["steps"])


def _ended(config: Config, state: Mapping[str, Any]) -> bool:
    is_late = config.search_minutes is not None and state["seconds"] >= 60 * config.search_minutes
    return is_late or state["generation"] >= config.search_generations


def _build(job: Job, ladder: Ladder, folder: Path) -> Levels:
    config, shapes = level_config(job.config), job.network.layer_shapes()
    steps = [np.clip(level, ladder.lowest, ladder.highest) for level in range(-LEVELS, LEVELS + 1)]
    return build_levels(job, [plan_of(config, ladder.sparsity(s), shapes) for s in steps], folder, "prune to levels")


def _next_generation(
    job: Job, levels: Levels, ladder: Ladder, dense: Activations, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state after one more generation."""
    start, generation, count = time.perf_counter(), state["generation"] + 1, len(job.unseen)
    random, parent = np.random.default_rng([job.config.seed, generation]), np.array(state["steps"])
    after = {**state, "generation": generation}
    alive = offspring_of(ladder, parent, random)
    for share, kept in SELECTION:
        sequences = (random.integers(count) + np.arange(max(1, round(share * count)))) % count
        found = _divergences(job, levels, ladder, dense, alive, sequences) if len(alive) > kept else [0.0] * len(alive)
        alive = [alive[number] for number in np.argsort(found, kind="stable")[:kept]]  # NaN is last
    for child, found in zip(alive, _divergences(job, levels, ladder, dense, alive, np.arange(count)), strict=True):
        if found < after["divergence"]:
            after |= {"steps": child.tolist(), "divergence": found}
    if after["divergence"] < state["divergence"]:
        changed = {unit: int(step) for unit, step in zip(ladder.units, after["steps"], strict=True) if step}
        entry = {"generation": generation, "divergence": after["divergence"], "steps": changed}
        after["history"] = [*state["history"], entry]
    return after | {"seconds": state["seconds"] + time.perf_counter() - start}


def offspring_of(ladder: Ladder, parent: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Return allocations, steps (units,), that differ from a parent and each other by a few swaps of equal weights."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for _ in range(4 * OFFSPRING):  # some tries give what is there already
        child = parent.copy()
        for _ in range(min(random.integers(1, _MOST_SWAPS + 1, size=2))):  # one swap more often than three
            _swap(ladder, child, random)
        if len(found) < OFFSPRING and (child != parent).any():
            found.setdefault(tuple(child.tolist()), child)
    return list(found.values())


def _swap(ladder: Ladder, steps: np.ndarray, random: np.random.Generator) -> None:
    """Move weights from one unit to another, in place; nothing where no two can exchange them."""
    can_rise, can_fall = steps < ladder.highest, steps > ladder.lowest
    pairs = can_rise[:, None] & can_fall & (ladder.moved[:, None] == ladder.moved)
    np.fill_diagonal(pairs, False)
    if pairs.any():
        rising, falling = random.choice(np.argwhere(pairs))
        steps[rising] += 1
        steps[falling] -= 1


def _divergences(
    job: Job, levels: Levels, ladder: Ladder, dense: Activations, steps: Sequence[np.ndarray], sequences: np.ndarray
) -> list[float]:
    """Return the mean divergence from the dense model of allocations over sequences of the held-out text."""
    if not steps:
        return []
    variants = [variant_of(job.network, ladder.levels(one)) for one in steps]
    outputs = run_variants(job, levels, variants, job.unseen[sequences], "offspring")
    return divergences(job, dense, outputs, sequences.tolist()).mean(1).tolist()


def _ranked(judged: Mapping[str, Any]) -> list[str]:
    """Return the names of those with a finite perplexity, from the lowest on."""
    finite = {name: found["perplexity"] for name, found in judged.items() if found["perplexity"] is not None}
    if not finite:
        raise NotFiniteError("--allocation search: no allocation gives a finite perplexity")
    return sorted(finite, key=finite.__getitem__)
