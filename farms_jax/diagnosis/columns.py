"""The columns of a diagnosis: their names, order, meanings and formats, and their names in WeightWatcher.

The names say what is measured. Without a prefix, `alpha` and its companions are those of FARMS's windows, as in
`LayerReport`. The same measure of the whole matrix begins with `whole_`. What follows from WeightWatcher's own fit of
the whole matrix (the threshold of the smallest KS distance among eigenvalues above 1e-5) begins with `ww_`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from farms_jax.errors import InputError

MISSING = "–"
Row = Mapping[str, Any]  # a layer's values by the name of the column


class Column(NamedTuple):
    """One column: the key of a row, what it means in one line, and how it is shown."""

    name: str
    meaning: str  # for tooltips and documentation
    format: str  # of a number, for `format()`; empty for text
    head: str = ""  # short name in the terminal; empty for a column that the terminal leaves out
    weightwatcher: str = ""  # name of the column with the same value in WeightWatcher
    group: str = ""  # heading in reports


_GROUPS: dict[str, tuple[Column, ...]] = {
    "layer": (
        Column("layer", "full path of the weight", "", "layer"),
        Column("status", "what the layer is, in a word: see what the statuses mean", "", "status"),
        Column("reason", "why, in plain words", ""),
        Column("shape", "shape of the stored array", "", "shape"),
        Column("num_params", "entries of the array", "d"),
        Column("N", "longer axis of its matrices", "d", "", "N"),
        Column("M", "shorter axis of its matrices", "d", "", "M"),
        Column("Q", "aspect ratio N / M, at least 1", ".3g", "", "Q"),
        Column("structure", "what the weights are exactly, where they are special: constant, orthogonal, pruned", ""),
        Column("zeros", "share of the weights that are zero, in [0, 1]", ".3f"),
        Column("dead", "largest share of rows, columns or kernel positions that are zero, or nearly, in [0, 1]", ".3f"),
        Column("type", "kind of module, from its name: q, k, v, o, gate, up, down, conv, head", ""),
        Column("place", "place in the network, 1 the first", "d"),
    ),
    "FARMS windows": (
        Column("alpha", "exponent of the tail over windows of one aspect ratio; smaller is heavier", ".3f", "alpha"),
        Column("alpha_low", "lower end of its confidence interval", ".3f"),
        Column("alpha_high", "upper end of its confidence interval", ".3f"),
        Column("rank", "place of the layer by alpha; 1 is the heaviest tail", "d", "rank"),
        Column("rank_low", "lower end of the confidence interval of the place", "d"),
        Column("rank_high", "upper end of the confidence interval of the place", "d"),
        Column("rank_flips", "share of resamples in which the place is another, in [0, 1]", ".2f", "flips"),
        Column("noise_alpha", "alpha, by the median rule, of independent entries (Marchenko-Pastur)", ".3f", "noise"),
        Column("noise_low", "lower end of the band of alpha of noise of this shape, window and law of entries", ".3f"),
        Column("noise_high", "upper end of that band", ".3f"),
        Column(
            "heavy_alpha", "alpha where inputs and outputs are correlated with exponent 2: below it, too much", ".3f"
        ),
        Column("num_windows", "windows measured, over all kernel positions", "d"),
        Column("ks_distance", "KS distance of the tail of the windows, in [0, 1]", ".3f", "KS"),
        Column("xmin", "eigenvalue where that tail starts", ".4g"),
        Column("num_tail", "eigenvalues in that tail", "d"),
        Column("median_alpha", "alpha by the median rule, which status and noise go by", ".3f", "median"),
        Column("median_low", "lower end of its confidence interval", ".3f"),
        Column("median_high", "upper end of its confidence interval", ".3f"),
        Column("median_ks_distance", "KS distance of its tail, in [0, 1]", ".3f"),
        Column("median_num_tail", "eigenvalues in its tail", "d"),
    ),
    "whole matrix": (
        Column("whole_alpha", "exponent by the same rule over the whole matrix", ".3f", "whole"),
        Column("aspect_ratio_bias", "whole_alpha - alpha", "+.3f", "bias"),
        Column("whole_num_eigenvalues", "eigenvalues, over all kernel positions", "d", "", "num_evals"),
        Column(
            "whole_norm",
            "sum of the eigenvalues: squared Frobenius norm, of a kernel times `kernel_scale`",
            ".4g",
            "",
            "norm",
        ),
        Column("whole_log_norm", "log10 of whole_norm", ".3f", "", "log_norm"),
        Column("whole_largest_eigenvalue", "largest eigenvalue", ".4g", "", "spectral_norm"),
        Column("whole_log_largest_eigenvalue", "log10 of whole_largest_eigenvalue", ".3f", "", "log_spectral_norm"),
        Column("whole_stable_rank", "whole_norm / whole_largest_eigenvalue", ".1f", "stable", "stable_rank"),
        Column("effective_rank", "exp of the entropy of the singular values (Roy and Vetterli 2007)", ".1f"),
        Column("entropy", "entropy of the eigenvalues over log of the rank, in [0, 1]", ".3f", "", "entropy"),
        Column(
            "matrix_rank", "singular values above the largest times N times machine epsilon", "d", "", "matrix_rank"
        ),
        Column("rank_loss", "singular values at or below that, each kernel position by itself", "d", "", "rank_loss"),
        Column("numerical_rank", "singular values that the rounding of the weights' dtype does not explain", "d"),
        Column("weak_rank_loss", "eigenvalues below 1e-6", "d", "", "weak_rank_loss"),
        Column("sv_max", "largest singular value", ".4g", "", "sv_max"),
        Column("sv_min", "smallest singular value; of a kernel, the largest of its positions'", ".3g", "", "sv_min"),
    ),
    "WeightWatcher's fit": (
        Column("ww_alpha", "exponent with the best threshold by KS distance", ".3f", "ww", "alpha"),
        Column("ww_status", "WeightWatcher's own verdict on ww_alpha: over-trained below 2, under-trained above 6", ""),
        Column("ww_ks_distance", "KS distance of that fit, in [0, 1]", ".3f", "", "D"),
        Column("ww_xmin", "eigenvalue where that tail starts", ".4g", "", "xmin"),
        Column("ww_xmax", "largest eigenvalue of that fit", ".4g", "", "xmax"),
        Column("ww_sigma", "standard error of ww_alpha, (ww_alpha - 1) / sqrt(ww_num_tail)", ".3g", "", "sigma"),
        Column("ww_num_tail", "eigenvalues in that tail", "d", "", "num_pl_spikes"),
        Column("ww_alpha_hat", "ww_alpha times log10 of the largest eigenvalue", ".3f", "", "alpha_weighted"),
        Column(
            "ww_log_alpha_norm", "log10 of the sum of eigenvalues to the power ww_alpha", ".3f", "", "log_alpha_norm"
        ),
        Column(
            "ww_num_erg_spikes",
            "largest eigenvalues, in units of their mean, whose product is 1 (ERG or detX condition)",
            "d",
            "",
            "num_ERG_spikes",
        ),
        Column("ww_detx_val", "smallest of these eigenvalues", ".4g", "", "detX_val"),
        Column("ww_erg_gap", "ww_num_erg_spikes - ww_num_tail; 0 in an ideal layer", "+d", "", "ERG_gap"),
    ),
    "other tails": (
        Column(
            "gof_p", "share of power-law samples that fit worse than the spectrum; below 0.1 it is no power law", ".2f"
        ),
        Column(
            "ww_clipped_alpha", "ww_alpha without fingers, the few largest eigenvalues that raise it by over 1", ".3f"
        ),
        Column("ww_num_fingers", "how many those are; WeightWatcher's raw_alpha is ww_alpha", "d", "", "num_fingers"),
        Column("tpl_alpha", "exponent of a power law with an exponential cutoff, in [0, 3]", ".3f"),
        Column("tpl_lambda", "rate of that cutoff, in 1 / eigenvalue", ".3g", "", "Lambda"),
        Column("tpl_ks_distance", "KS distance of that fit, in [0, 1]", ".3f"),
        Column("tpl_xmin", "eigenvalue where that tail starts", ".4g"),
        Column("exponential_ratio", "log-likelihood of WeightWatcher's power law less that of an exponential", "+.3g"),
        Column("exponential_p", "how likely such a ratio is if both fit the tail as well", ".3f"),
        Column("truncated_ratio", "the same against a power law with a cutoff", "+.3g"),
        Column("truncated_p", "how likely such a ratio is without a cutoff", ".3f"),
        Column("lognormal_ratio", "the same against a lognormal law", "+.3g"),
        Column("lognormal_p", "how likely such a ratio is if both fit the tail as well", ".3f"),
    ),
    "against noise": (
        Column("mp_sigma", "deviation of an entry that fits the bulk to the Marchenko-Pastur law", ".3g"),
        Column("mp_min", "lower edge of that bulk", ".4g"),
        Column("mp_max", "upper edge of that bulk", ".4g"),
        Column("mp_spikes", "eigenvalues beyond it, by more than its fluctuation", "d", "spikes"),
        Column(
            "mp_rand_spikes", "how many of these the shuffled matrix has too, by chance or by single large weights", "d"
        ),
        Column("mp_distance", "KS distance of the others from that law, in [0, 1]", ".3f"),
        Column(
            "rand_distance",
            "Jensen-Shannon distance from the spectrum of the shuffled matrix",
            ".3f",
            "",
            "rand_distance",
        ),
        Column("max_rand_eval", "largest eigenvalue of the shuffled matrix", ".4g", "", "max_rand_eval"),
        Column("ww_softrank", "max_rand_eval / whole_largest_eigenvalue", ".3f", "", "ww_softrank"),
        Column("ww_num_spikes", "eigenvalues beyond the bulk of noise that WeightWatcher fits", "d", "", "num_spikes"),
        Column("ww_mp_softrank", "upper edge of that bulk over the largest eigenvalue", ".3f", "", "mp_softrank"),
        Column(
            "rand_num_spikes",
            "eigenvalues of the shuffled matrix beyond such a bulk: correlation traps",
            "d",
            "",
            "rand_num_spikes",
        ),
    ),
}
COLUMNS = tuple(column._replace(group=group) for group, columns in _GROUPS.items() for column in columns)
BY_NAME = {column.name: column for column in COLUMNS}

# What a status goes by, and the columns that have it where `alpha` is that of another rule than the median.
MEDIAN = {
    "alpha": "median_alpha",
    "alpha_low": "median_low",
    "alpha_high": "median_high",
    "ks_distance": "median_ks_distance",
    "num_tail": "median_num_tail",
}


def by_median(row: Row) -> Row:
    """Return a row with `alpha` and its companions by the median rule, whatever rule was asked for."""
    return {**row, **{name: row[own] for name, own in MEDIAN.items() if own in row}}


def find_column(name: str, columns: Sequence[Column]) -> Column:
    """Return the column with a name, or with a head as in the terminal.

    >>> find_column("whole", COLUMNS).name
    'whole_alpha'

    Raises:
        InputError: there is no such column.
    """
    for column in columns:
        if name and name in {column.name, column.head}:
            return column
    raise InputError(f"there is no column {name!r}; columns are {', '.join(column.name for column in columns)}")


def plain(value: Any) -> Any:
    """Return a value as JSON and CSV have it: Python numbers and lists; `None` for NaN and infinity."""
    if hasattr(value, "tolist"):  # NumPy's and JAX's
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(row: Row, name: str) -> float | None:
    """Return a row's number to draw or to compare; `None` for a missing one."""
    value = plain(row.get(name))
    return float(value) if isinstance(value, (int, float)) else None


def half_width(row: Row) -> float | None:
    """Return half the confidence interval of `alpha`; `None` without one."""
    low, high = number(row, "alpha_low"), number(row, "alpha_high")
    return None if low is None or high is None else (high - low) / 2


def text(row: Row, column: Column) -> str:
    """Return one value as text; `–` for a missing one.

    >>> text({"Q": 1.5}, BY_NAME["Q"]), text({}, BY_NAME["Q"])
    ('1.5', '–')
    """
    value = plain(row.get(column.name))
    if value is None or value == "":
        return MISSING
    if isinstance(value, str) or not column.format:
        return str(value)
    return format(int(value) if column.format.endswith("d") else value, column.format)


def with_interval(row: Row, column: Column) -> str:
    """Return one value as text, `alpha` with half its confidence interval: `1.87 ±0.03`."""
    half = half_width(row) if column.name == "alpha" else None
    if half is None or number(row, column.name) is None:
        return text(row, column)
    return f"{row[column.name]:.2f} ±{half:.2f}"
