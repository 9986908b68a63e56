"""What a layer's measures say about it, in one word and one sentence, and which layers need attention first."""

import math
from collections import Counter
from collections.abc import Iterable

from farms_jax._present import counted
from farms_jax.diagnosis.columns import Row, by_median
from farms_jax.diagnosis.structure import CONSTANT, DIAGONAL, IDENTITY, ORTHOGONAL, PERMUTATION, ZERO

OVER_TRAINED, UNDER_TRAINED = 2.0, 6.0  # WeightWatcher's bounds on its alpha
NEAR_NOISE = 0.95  # of noise_alpha: a layer hardly below it is not called well trained, however sure that is
MISSING = 0.1  # share of directions, rows or columns without which a layer is no full matrix
SPIKED = 0.1  # KS distance of the bulk from noise, up to which the rest counts as noise
FEW = 0.05  # share of the eigenvalues that may stand beyond it
POWER_LAW = 0.1  # KS distance of a long tail, up to which it counts as a power law: that of noise is 0.18
WIDE = math.log(2)  # of log(alpha - 1): from noise to what is over-correlated

GOOD = "well trained"
UNSURE = "too few to say"
# The faults that spoil results most come first.
MEANINGS: dict[str, str] = {
    "degenerate": "it is no full matrix: zero, constant, diagonal, of low rank, or with dead rows or columns",
    "over-correlated": "alpha is below that of exponent 2 (heavy_alpha): few directions rule, as by too large a rate",
    "undertrained": "its spectrum is that of noise, or hardly apart: training has hardly touched it, or not yet",
    "spiked": "noise but for a few strong directions: early in training, or a mean that its weights share",
    "flat": "its eigenvalues, or most, are more equal than those of noise: orthogonal, or nearly",
    GOOD: "its tail is heavier than that of noise, and not too heavy",
    UNSURE: "so few eigenvalues of noise could have this alpha, and those of a trained layer too",
}
SEVERITY = tuple(MEANINGS)
UNTOLD = {"degenerate", UNSURE}  # statuses of layers whose alpha says nothing of how they are trained
_DEGENERATE, _EQUAL = (ZERO, CONSTANT, DIAGONAL), (IDENTITY, ORTHOGONAL, PERMUTATION)
_AGREED = {
    "over-trained": {"over-correlated"},
    "under-trained": {"undertrained", "spiked", "flat"},
    "good": {GOOD, "spiked"},
}


def status_of(row: Row) -> tuple[str, str]:
    """Return a layer's status, a key of `MEANINGS`, and the reason in plain words.

    The columns of the whole matrix may be missing from `row`.
    """
    structure, row = row.get("structure") or "", by_median(row)
    if reason := _degenerate(row, structure):
        return "degenerate", reason
    if structure.startswith(_EQUAL):
        return "flat", structure
    status, reason = _without_tail(row) if row["alpha"] is None else _by_alpha(row)
    return status, f"{reason}; {structure}" if structure else reason


def ww_status(row: Row) -> str | None:
    """Return WeightWatcher's own verdict, by its alpha of the whole matrix; `None` without one."""
    alpha = row.get("ww_alpha")
    if alpha is None:
        return None
    return "over-trained" if alpha < OVER_TRAINED else "under-trained" if alpha > UNDER_TRAINED else "good"


def disagreements(rows: Iterable[Row]) -> list[tuple[Row, str]]:
    """Return the layers that WeightWatcher judges otherwise, with a sentence on why, the largest difference first.

    Layers without a tail, or with too few eigenvalues, are left out: there is nothing to set against each other.
    """
    known = [row for row in rows if row.get("ww_status") in _AGREED and row["status"] not in UNTOLD]
    found = [row for row in known if row["status"] not in _AGREED[row["ww_status"]]]
    found.sort(key=lambda row: -abs(math.log(row["ww_alpha"] / (row["alpha"] or row["ww_alpha"]))))
    return [(row, _disagreement(row)) for row in found]


def disagreement_summary(rows: Iterable[Row]) -> list[str]:
    """Return a sentence for each verdict of WeightWatcher that FARMS does not share everywhere, with what it says."""
    rows = list(rows)
    differing, said = {row["ww_status"] for row, _ in disagreements(rows)}, []
    for verdict in (verdict for verdict in _AGREED if verdict in differing):
        found = counts(row for row in rows if row.get("ww_status") == verdict)
        parts = ", ".join(f"{count} {status}" for status, count in sorted(found.items(), key=lambda item: -item[1]))
        said.append(
            f"of {counted(sum(found.values()), 'layer')} that WeightWatcher calls {verdict}, FARMS calls {parts}"
        )
    return said


def severity(status: str | None) -> int:
    """Return the position of a status in `SEVERITY`, 0 the worst; unknown ones come last."""
    return SEVERITY.index(status) if status in SEVERITY else len(SEVERITY)


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Count the layers of each status, the worst status first; layers without one are not counted."""
    found = Counter(str(row["status"]) for row in rows if row.get("status"))
    return {status: found[status] for status in sorted(found, key=severity)}


def attention(rows: Iterable[Row]) -> list[Row]:
    """Return the layers that need a look, the worst first.

    Over-correlated layers start with the smallest alpha, undertrained ones with the largest.
    """

    def worst(row: Row) -> tuple[int, float]:
        alpha = row.get("alpha") or 0.0
        return severity(row["status"]), -alpha if row["status"] == "undertrained" else alpha

    return sorted(
        (row for row in rows if row.get("status") in MEANINGS and row["status"] not in {GOOD, UNSURE}), key=worst
    )


def _degenerate(row: Row, structure: str) -> str | None:
    if structure.startswith(_DEGENERATE):
        return structure
    if (row.get("dead") or 0) >= MISSING:
        return structure
    rank, count = row.get("numerical_rank"), row.get("whole_num_eigenvalues")
    if rank is None or not count or rank > (1 - MISSING) * count or structure.startswith(_EQUAL):
        return None
    kind = "rank one: all rows are multiples of one" if rank == 1 else f"low rank: {rank} of {count}"
    return f"{kind}; {structure}" if structure else kind


def _without_tail(row: Row) -> tuple[str, str]:
    if row.get("noise_low") is None:
        return UNSURE, f"too few eigenvalues for a tail: {row.get('whole_num_eigenvalues') or row['M']}"
    if _is_wide(row):
        return UNSURE, "too few eigenvalues: those of its windows are nearly equal, as those of noise may be"
    return "flat", "its eigenvalues are nearly equal, as of an orthogonal matrix: there is no tail to fit"


def _by_alpha(row: Row) -> tuple[str, str]:
    """Return the status of a layer with a tail, and the reason."""
    alpha, low, high = row["alpha"], row.get("alpha_low"), row.get("alpha_high")
    rule = "median rule's " if "median_alpha" in row else ""
    measured = f"{rule}alpha {alpha:.2f}" + ("" if low is None or high is None else f" ({low:.2f} to {high:.2f})")
    bound, noise, spikes = row["heavy_alpha"], row["noise_alpha"], _spikes(row)
    band, beyond = f"{row['noise_low']:.2f} to {row['noise_high']:.2f}", _count_spikes(row)
    if alpha < min(bound, row["noise_low"]):
        if (high or alpha) < bound:
            return "over-correlated", f"{measured} is below {bound:.2f}, that of exponent 2{_share(row)}{spikes}"
        return GOOD, f"{measured} is below noise, {band}, and not surely below {bound:.2f}, that of exponent 2{spikes}"
    inside = row["noise_low"] <= alpha <= row["noise_high"]
    few = beyond <= max(FEW * row.get("whole_num_eigenvalues", 0), 1)
    if inside or NEAR_NOISE * noise <= alpha < noise:
        if beyond:
            status = "spiked" if few and row["mp_distance"] <= SPIKED else GOOD
            return status, f"{measured} is near noise, {band}, but not all{spikes}"
        if inside and _is_wide(row):
            return UNSURE, f"{measured} may be noise, {band}, or anything{_needed(row)}"
        told = "that of noise" if inside else "hardly below noise"
        return "undertrained", f"{measured} is {told}, {band}{spikes}"
    if alpha < row["noise_low"]:
        return GOOD, f"{measured} is below noise, {band}{spikes}"
    if alpha <= UNDER_TRAINED and row["ks_distance"] <= max(POWER_LAW, row["num_tail"] ** -0.5):
        return GOOD, f"{measured} is that of a power law, above noise, {band}{spikes}"
    told = "its eigenvalues are" if not beyond else "most of its eigenvalues are" if few else "a heavy tail, the rest"
    return "flat" if few else GOOD, f"{measured} is above noise, {band}: {told} more equal{spikes}"


def _is_wide(row: Row) -> bool:
    """Return whether noise of so few eigenvalues has any alpha: whether a heavy layer's is as likely as not."""
    return row.get("noise_low") is not None and _half_band(row) >= WIDE


def _half_band(row: Row) -> float:
    return math.log((row["noise_high"] - 1) / (row["noise_low"] - 1)) / 2


def _needed(row: Row) -> str:
    """Return how many eigenvalues would do: the band narrows with the root of their number."""
    count = row["num_tail"]
    more = math.ceil(count * (_half_band(row) / WIDE) ** 2)
    return f": its tail has {count} eigenvalues, about {max(more, count + 1)} would do"


def _count_spikes(row: Row) -> int:
    """Return how many eigenvalues stand beyond noise and are not there by chance."""
    return (row.get("mp_spikes") or 0) - (row.get("mp_rand_spikes") or 0)


def _spikes(row: Row) -> str:
    if row.get("mp_spikes") is None:
        return ""
    count = _count_spikes(row)
    beyond = f"; {counted(count, 'eigenvalue') if count else 'no eigenvalue'} beyond the bulk of noise"
    chance = row.get("mp_rand_spikes")
    return f"{beyond}{', and' if count else ' but'} {chance} that its shuffled weights have too" if chance else beyond


def _share(row: Row) -> str:
    stable_rank = row.get("whole_stable_rank")
    return f"; the largest eigenvalue holds {1 / stable_rank:.0%} of the norm" if stable_rank else ""


def _disagreement(row: Row) -> str:
    """Return why the two verdicts differ."""
    tail, count, theirs = row["ww_num_tail"], row["whole_num_eigenvalues"], f"ww_alpha {row['ww_alpha']:.2f}"
    said = f"{theirs} fits the {tail} largest of {count} eigenvalues"
    if (ratio := row["Q"]) >= 1.5 and row["ww_status"] == "under-trained":
        said += f" of a matrix of aspect ratio {ratio:.1f}, where noise too has a large one"
    return f"{said}; over windows of one aspect ratio {row['reason']}"
