"""allocate_sparsity(): from scores of layers to the sparsity of each, under one global budget."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Literal

import numpy as np

from farms_jax._report import LayerReport

_MOST_TOTALS = 2**13  # that rounding keeps in mind
HIGHEST = 0.998  # the reference gives this to a layer that would pass 1


def allocate_sparsity(
    scores: LayerReport | Mapping[str, float],
    *,
    sparsity: float,
    epsilon: float,
    block_of: Callable[[str], str] | None = None,
    num_params: Mapping[str, int] | None = None,
    rule: Literal["scale", "shift"] = "scale",
    budget: Literal["exact", "reference"] = "exact",
    highest: float = HIGHEST,
) -> dict[str, float]:
    r"""Give every layer its sparsity: the higher the score, the more is removed.

    >>> scores = {"block.0": 2.0, "block.1": 3.0, "block.2": 4.0}
    >>> sizes = {"block.0": 100, "block.1": 100, "block.2": 200}
    >>> found = allocate_sparsity(scores, sparsity=0.5, epsilon=0.2, num_params=sizes)
    >>> {layer: round(value, 4) for layer, value in found.items()}
    {'block.0': 0.381, 'block.1': 0.4762, 'block.2': 0.5714}

    Scores are mapped linearly to [1 - epsilon, 1 + epsilon] and multiplied by the one factor that meets the budget
    (`"scale"`: AlphaPruning, FARMS), or mapped to [-epsilon, epsilon] and moved by one amount (`"shift"`: OWL, DLP,
    ATP; epsilon is their lambda, alpha, or half of beta times the number of steps). Where all scores are equal, every
    layer has the global sparsity. A report's layer without a tail (alpha 0) gets the mean score of the others.

    Args:
        scores: a report, whose alphas are the scores, or a score for each layer.
        sparsity: fraction of all weights of these layers to remove, in [0, 1).
        epsilon: half the range: relative to the sparsity for `"scale"`, in [0, 1); absolute for `"shift"`, in [0, 1].
        block_of: the name of a layer's block, such as `farms_jax.block_of`: the layers of a block share one
            sparsity, from the mean of their scores. `None`: every layer has its own.
        num_params: weights in each layer; not needed with a report.
        rule: see above.
        budget: `"exact"` removes exactly `sparsity` of all weights: a layer that would pass `highest` gets that, and
            the others share the rest. `"reference"` is the public code's rule, for comparisons: what passes 1 becomes
            0.998 (0.99999 at a sparsity of exactly 0.7) with nothing shared, so that less than asked is removed.
        highest: the most that is removed from any layer, in [sparsity, 1].

    Returns:
        Sparsity of each layer by name, in the order of `scores`.

    Raises:
        ValueError: an argument is out of its range, a score is not finite, there are no layers, or a size is missing.

    References:
        Lu et al., AlphaPruning, NeurIPS 2024, section 3.2; Yin et al., Outlier Weighed Layerwise Sparsity, ICML 2024.
    """
    _check(sparsity, epsilon, highest, rule, budget)
    layers, values, sizes = _read(scores, num_params)
    blocks = [block_of(layer) for layer in layers] if block_of else layers
    order = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    block = np.array([order[name] for name in blocks])
    means = np.bincount(block, values) / np.bincount(block)
    weights = np.bincount(block, sizes)
    spread = means.max() - means.min()
    unit = 2 * (means - means.min()) / spread - 1 if spread > 0 else np.zeros_like(means)
    if budget == "reference":
        found = _reference_budget(1 + epsilon * unit, weights, sparsity)
    elif rule == "scale":
        relative = 1 + epsilon * unit
        ends = np.append(highest / relative, 0)
        found = _meet_budget(lambda c: np.minimum(c * relative, highest), ends, weights, sparsity)
    else:
        ends = np.concatenate([-epsilon * unit, highest - epsilon * unit])
        found = _meet_budget(lambda c: np.clip(epsilon * unit + c, 0, highest), ends, weights, sparsity)
    return dict(zip(layers, found[block].tolist(), strict=True))


def round_to_groups(
    sparsity: Mapping[str, float],
    num_params: Mapping[str, int],
    *,
    group: int | Mapping[str, int],
    block_of: Callable[[str], str] | None = None,
) -> dict[str, int]:
    """Turn sparsities into whole numbers of weights to remove from each group of `group` weights.

    With one group size this is mixed N:M; with each layer's number of inputs, the weights to remove from every row.

    Each number is the fraction above or below it, and together they remove as nearly as many weights as `sparsity`
    does as such numbers can, whatever the sizes of the layers; among those that come equally near, fractions are
    rounded as little as possible (largest remainders first). Rounding leaves at least one weight of each group of two
    and more; only a sparsity of 1 removes them all, and what a full layer cannot take, others do.

    >>> round_to_groups({"a": 0.4, "b": 0.6, "c": 0.5}, {"a": 64, "b": 64, "c": 64}, group=4)
    {'a': 2, 'b': 2, 'c': 2}
    >>> round_to_groups({"k": 0.14, "q": 0.19}, {"k": 256, "q": 512}, group=2)
    {'k': 1, 'q': 0}

    Args:
        sparsity: sparsity of each layer, in [0, 1], from `allocate_sparsity`.
        num_params: weights in each layer.
        group: M of N:M, or the size for each layer; layers of one block must have the same.
        block_of: layers of one block get one N; `None`: every layer has its own.

    Returns:
        Number of weights to remove from each group, by layer.

    Raises:
        ValueError: `group` is no integer above 0, or differs within a block; a sparsity is outside [0, 1]; or a layer
            has no size.
    """
    blocks = {layer: block_of(layer) if block_of else layer for layer in sparsity}
    groups: dict[str, int] = {}
    sizes: dict[str, int] = {}
    wanted: dict[str, float] = {}
    for layer, block in blocks.items():
        size = group.get(layer) if isinstance(group, Mapping) else group
        if not isinstance(size, Integral) or size < 1 or groups.setdefault(block, int(size)) != size:
            raise ValueError(f"round_to_groups: group must be at least 1 and one for all of {block}, got {size}")
        if not 0 <= sparsity[layer] <= 1:
            raise ValueError(f"round_to_groups: the sparsity of {layer} must be in [0, 1], got {sparsity[layer]}")
        if num_params.get(layer, 0) < 1:
            raise ValueError(f"round_to_groups: num_params has no size for {layer}")
        sizes[block] = sizes.get(block, 0) + num_params[layer]
        wanted[block] = wanted.get(block, 0.0) + num_params[layer] * sparsity[layer]
    if not blocks:
        return {}
    exact = np.array([groups[block] * wanted[block] / sizes[block] for block in groups])
    step = np.array([sizes[block] / groups[block] for block in groups])  # weights that one more of each group removes
    # 1e-9: a sparsity of 0.5 that arrives as 0.4999999999 is still 2 of 4.
    least = np.floor(exact + 1e-9)
    # One of each group stays, as `allocate_sparsity` keeps some of each layer; other blocks remove more instead.
    most = np.maximum(least, np.maximum(np.array(list(groups.values())) - 1, 1))
    removed = dict(zip(groups, _whole_numbers(exact, least, most, step), strict=True))
    return {layer: removed[block] for layer, block in blocks.items()}


def _whole_numbers(exact: np.ndarray, least: np.ndarray, most: np.ndarray, step: np.ndarray) -> list[int]:
    """Return whole numbers from `least` to `most`, for which the sum of number * `step` is nearest that of `exact`.

    They are at most one above `least`, or as many more as the sum needs. All arrays are (B,), one entry per block.
    """
    rest = float((exact - least) @ step)
    above = np.ones_like(least)
    while (np.minimum(least + above, most) - least) @ step < rest and (least + above < most).any():
        above += 1
    # One step more is a unit of its block; the units of equal steps are taken in order of how little they round.
    units: dict[float, list[tuple[float, int]]] = {}
    for block, upper in enumerate(np.minimum(least + above, most)):
        for number in range(int(least[block]), int(upper)):
            cost = 2 * (number - exact[block]) + 1  # of the squared distance to `exact`
            units.setdefault(float(step[block]), []).append((cost, block))
    sums, costs, choices = np.zeros(1), np.zeros(1), []
    for size in sorted(units, reverse=True):  # the small ones last: they find what is still missing
        units[size].sort()
        counts = np.arange(len(units[size]) + 1)
        cost = size * np.append(0, np.cumsum([cost for cost, _ in units[size]]))
        totals = np.add.outer(sums, counts * size).ravel()
        paid = np.add.outer(costs, cost).ravel()
        kept = _best_of_each(totals, paid, rest)
        choices.append((size, kept // len(counts), kept % len(counts)))
        sums, costs = totals[kept], paid[kept]
    removed = least.astype(int)
    gap = np.abs(sums - rest)
    state = int(np.lexsort((-sums, costs, gap > gap.min() + 1e-9 * step.sum()))[0])
    for size, before, count in reversed(choices):
        for _, block in units[size][: count[state]]:
            removed[block] += 1
        state = before[state]
    return removed.tolist()


def _best_of_each(totals: np.ndarray, paid: np.ndarray, rest: float) -> np.ndarray:
    """Return the indices of one of the cheapest ways to each total; of very many totals, those of a grid."""
    scale = max(float(totals.max()), 1.0)
    grid = np.round(totals / scale * 2**40)
    order = np.lexsort((paid, grid))
    kept = order[np.append(True, np.diff(grid[order]) > 0)]
    if len(kept) > _MOST_TOTALS:
        near = kept[np.argsort(np.abs(totals[kept] - rest), kind="stable")[: _MOST_TOTALS // 2]]
        kept = np.union1d(near, kept[:: -(-len(kept) // (_MOST_TOTALS // 2))])
    return kept


def _check(sparsity: float, epsilon: float, highest: float, rule: str, budget: str) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"allocate_sparsity: sparsity must be in [0, 1), got {sparsity}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"allocate_sparsity: epsilon must be in [0, 1], got {epsilon}")
    if epsilon == 1 and rule == "scale":  # the block of the lowest score would keep everything at any budget
        raise ValueError("allocate_sparsity: epsilon must be below 1 for rule='scale'")
    if not sparsity <= highest <= 1:
        raise ValueError(f"allocate_sparsity: highest must be in [sparsity, 1] = [{sparsity}, 1], got {highest}")
    if rule not in {"scale", "shift"}:
        raise ValueError(f"allocate_sparsity: rule must be 'scale' or 'shift', got {rule!r}")
    if budget not in {"exact", "reference"}:
        raise ValueError(f"allocate_sparsity: budget must be 'exact' or 'reference', got {budget!r}")
    if budget == "reference" and rule != "scale":
        raise ValueError("allocate_sparsity: budget='reference' is defined for rule='scale' only")


def _read(
    scores: LayerReport | Mapping[str, float], num_params: Mapping[str, int] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the layers, their scores and their sizes, float64."""
    if isinstance(scores, LayerReport):
        layers, values = list(scores.names), impute_alphas(np.asarray(scores.alpha, np.float64))
        num_params = num_params or dict(zip(scores.names, scores.num_params, strict=True))
    else:
        layers, values = list(scores), np.array(list(scores.values()), np.float64)
    if not layers:
        raise ValueError("allocate_sparsity: there are no layers; was everything left out of the analysis?")
    if bad := [layer for layer, value in zip(layers, values, strict=True) if not np.isfinite(value)]:
        raise ValueError(f"allocate_sparsity: the score of {', '.join(bad)} is not finite")
    if num_params is None:
        raise ValueError("allocate_sparsity: give num_params, the number of weights in each layer")
    if missing := [layer for layer in layers if num_params.get(layer, 0) < 1]:
        raise ValueError(f"allocate_sparsity: num_params has no size for {', '.join(missing)}")
    return layers, values, np.array([num_params[layer] for layer in layers], np.float64)


def impute_alphas(alphas: np.ndarray) -> np.ndarray:
    """Replace the alpha 0 of layers without a tail by the mean of the others, or by 1 where no layer has one."""
    fitted = alphas > 0
    return np.where(fitted, alphas, alphas[fitted].mean() if fitted.any() else 1.0)


def _meet_budget(
    at: Callable[[float], np.ndarray], ends: np.ndarray, weights: np.ndarray, sparsity: float
) -> np.ndarray:
    # The mean of at(c) grows with c, linearly between the `ends`, where a block meets a bound: it is inverted exactly.
    ends = np.unique(ends)
    totals, target = np.array([weights @ at(end) for end in ends]), sparsity * weights.sum()
    # The first segment that reaches the target; between ends where every block is at a bound the mean is constant.
    last = min(max(1, int(np.searchsorted(totals, target))), len(ends) - 1)
    first = last - 1
    share = (target - totals[first]) / max(totals[last] - totals[first], np.finfo(float).tiny)
    return at(float(ends[first] + min(max(share, 0), 1) * (ends[last] - ends[first])))


def _reference_budget(relative: np.ndarray, weights: np.ndarray, sparsity: float) -> np.ndarray:
    # In the reference the number of weights to remove is a float32 scalar.
    found = relative * (float(np.float32(weights.sum() * sparsity)) / (weights @ relative))
    return np.where(found > 1, 0.99999 if sparsity == 0.7 else HIGHEST, found)
