"""What a layer's measures say about it, in one word and one sentence, and which layers need attention first."""

from collections import Counter
from collections.abc import Iterable

from farms_jax.diagnosis.columns import Row

OVER_CORRELATED = 2.0  # alpha below it: Martin and Mahoney 2021 (JMLR 22), and WeightWatcher's "over-trained"
UNDERTRAINED = 6.0  # alpha above it: the same, for rules under which noise has no alpha of its own
AT_NOISE = 0.98  # of noise_alpha: matrices of independent entries scatter by less than 2 % about it
NEAR_NOISE = 0.95  # a layer further below is not called undertrained, however wide its interval

GOOD = "well trained"
# The faults that spoil results most come first.
MEANINGS: dict[str, str] = {
    "degenerate": "it has no tail to measure: zero, constant, or of low rank",
    "over-correlated": "its tail is very heavy (ww_alpha below 2): perhaps overfitted, or trained at too large a rate",
    "undertrained": "its spectrum is that of noise: training has hardly touched it, or not yet",
    GOOD: "its tail is heavier than that of noise, and not too heavy",
}
SEVERITY = tuple(MEANINGS)


def status_of(row: Row) -> tuple[str, str]:
    """Return a layer's status, a key of `MEANINGS`, and the reason in plain words.

    The columns of the whole matrix may be missing from `row`.
    """
    if reason := _degenerate(row):
        return "degenerate", reason
    alpha, stable_rank = row.get("ww_alpha"), row.get("whole_stable_rank")
    if alpha is not None and 1 < alpha < OVER_CORRELATED:
        share = f"; the largest eigenvalue holds {1 / stable_rank:.0%} of the norm" if stable_rank else ""
        return "over-correlated", f"ww_alpha {alpha:.2f} of the whole matrix is below {OVER_CORRELATED:g}{share}"
    low, high, noise = (row.get(name) for name in ("alpha_low", "alpha_high", "noise_alpha"))
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    measured, spikes = f"alpha {row['alpha']:.2f}{interval} of the windows", _spikes(row)
    if noise is None:
        if row["alpha"] > UNDERTRAINED:
            return "undertrained", f"{measured} is above {UNDERTRAINED:g}{spikes}"
        return GOOD, f"{measured} is below {UNDERTRAINED:g}{spikes}"
    reaches = (high or row["alpha"]) >= AT_NOISE * noise
    if reaches and row["alpha"] >= NEAR_NOISE * noise:
        return "undertrained", f"{measured} is that of noise, {noise:.2f}{spikes}"
    unsure = ", but too uncertain to exclude it" if reaches else ""
    return GOOD, f"{measured} is below that of noise, {noise:.2f}{unsure}{spikes}"


def severity(status: str | None) -> int:
    """Return the position of a status in `SEVERITY`, 0 the worst; unknown ones come last."""
    return SEVERITY.index(status) if status in SEVERITY else len(SEVERITY)


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Count the layers of each status, the worst status first; layers without one are not counted."""
    found = Counter(str(row["status"]) for row in rows if row.get("status"))
    return {status: found[status] for status in sorted(found, key=severity)}


def attention(rows: Iterable[Row]) -> list[Row]:
    """Return the layers that are not well trained, the worst first.

    Over-correlated layers start with the smallest alpha, undertrained ones with the largest.
    """

    def worst(row: Row) -> tuple[int, float]:
        alpha = row.get("alpha") or 0.0
        return severity(row["status"]), -alpha if row["status"] == "undertrained" else alpha

    return sorted((row for row in rows if row.get("status") in MEANINGS and row["status"] != GOOD), key=worst)


def _degenerate(row: Row) -> str | None:
    rank, count = row.get("matrix_rank"), row.get("whole_num_eigenvalues")
    if row.get("whole_largest_eigenvalue") == 0:
        return "every weight is zero"
    if rank is not None and count and 2 * rank < count:
        return f"rank {rank} of {count}: {'constant' if rank <= 1 else 'most directions are missing'}"
    if row["alpha"] is None:
        return "its eigenvalues are zero or equal: there is no tail to fit"
    return None


def _spikes(row: Row) -> str:
    count = row.get("mp_spikes")
    if not count:
        return "" if count is None else "; no eigenvalue beyond the bulk of noise"
    return f"; {count} eigenvalue{'' if count == 1 else 's'} beyond the bulk of noise"
