"""The columns of a diagnosis: one place for their names, order, meaning and format.

Columns that mean the same as one of WeightWatcher's have its name and its value (whole matrices; power law with the
threshold of the smallest KS distance among eigenvalues above 1e-5).
"""

from typing import NamedTuple


class Column(NamedTuple):
    """One column.

    Attributes:
        name: key of a row.
        meaning: one line, for people; tooltips and documentation show it.
        format: of a number, for `format()`; empty for text.
        short: head of the column in the terminal; empty where the terminal does not show it.
        group: heading under which reports list it.
    """

    name: str
    meaning: str
    format: str = ".4g"
    short: str = ""
    group: str = ""


_LAYER = "layer"
_FARMS = "FARMS windows"
_WHOLE = "whole matrix"
_NOISE = "against noise"

COLUMNS: tuple[Column, ...] = (
    Column("layer", "full path of the weight", "", "layer", _LAYER),
    Column("status", "undertrained, well trained, over-correlated or degenerate", "", "status", _LAYER),
    Column("reason", "why, in plain words", "", "", _LAYER),
    Column("shape", "shape of the stored array", "", "shape", _LAYER),
    Column("num_params", "entries of the array", "d", "", _LAYER),
    Column("N", "longer axis of its matrices", "d", "", _LAYER),
    Column("M", "shorter axis of its matrices", "d", "", _LAYER),
    Column("Q", "aspect ratio N / M, at least 1", ".3g", "", _LAYER),
    Column(
        "farms_alpha",
        "exponent of the tail over windows of one aspect ratio; smaller is heavier",
        ".3f",
        "alpha",
        _FARMS,
    ),
    Column("farms_low", "lower end of its confidence interval", ".3f", "", _FARMS),
    Column("farms_high", "upper end of its confidence interval", ".3f", "", _FARMS),
    Column("rank", "place of the layer by farms_alpha; 1 is the heaviest tail", "d", "rank", _FARMS),
    Column("rank_low", "lower end of the confidence interval of the place", "d", "", _FARMS),
    Column("rank_high", "upper end of the confidence interval of the place", "d", "", _FARMS),
    Column("rank_flips", "share of resamples in which the place is another, in [0, 1]", ".2f", "flips", _FARMS),
    Column("noise_alpha", "farms_alpha of a matrix of independent entries (Marchenko-Pastur)", ".3f", "noise", _FARMS),
    Column("num_windows", "windows measured, over all kernel positions", "d", "", _FARMS),
    Column("farms_D", "KS distance of the tail of the windows, in [0, 1]", ".3f", "KS", _FARMS),
    Column("farms_xmin", "eigenvalue where that tail starts", ".4g", "", _FARMS),
    Column("farms_num_pl_spikes", "eigenvalues in that tail", "d", "", _FARMS),
    Column("whole_alpha", "exponent by the same rule over the whole matrix", ".3f", "whole", _WHOLE),
    Column("aspect_ratio_bias", "whole_alpha - farms_alpha", "+.3f", "bias", _WHOLE),
    Column("alpha", "exponent with the best threshold by KS distance, as WeightWatcher's", ".3f", "ww", _WHOLE),
    Column("D", "KS distance of that fit, in [0, 1]", ".3f", "", _WHOLE),
    Column("xmin", "eigenvalue where that tail starts", ".4g", "", _WHOLE),
    Column("xmax", "largest eigenvalue of that fit", ".4g", "", _WHOLE),
    Column("sigma", "standard error of alpha, (alpha - 1) / sqrt(tail size)", ".3g", "", _WHOLE),
    Column("num_pl_spikes", "eigenvalues in that tail", "d", "", _WHOLE),
    Column("alpha_weighted", "alpha-hat: alpha times log10 of the largest eigenvalue", ".3f", "", _WHOLE),
    Column("log_alpha_norm", "log10 of the sum of eigenvalues to the power alpha", ".3f", "", _WHOLE),
    Column("num_evals", "eigenvalues, over all kernel positions", "d", "", _WHOLE),
    Column("norm", "sum of the eigenvalues: squared Frobenius norm", ".4g", "", _WHOLE),
    Column("log_norm", "log10 of norm", ".3f", "", _WHOLE),
    Column("spectral_norm", "largest eigenvalue", ".4g", "", _WHOLE),
    Column("log_spectral_norm", "log10 of spectral_norm", ".3f", "", _WHOLE),
    Column("stable_rank", "norm / spectral_norm", ".1f", "stable", _WHOLE),
    Column("effective_rank", "exp of the entropy of the singular values (Roy and Vetterli 2007)", ".1f", "", _WHOLE),
    Column("entropy", "entropy of the eigenvalues over log of the rank, in [0, 1]", ".3f", "", _WHOLE),
    Column("matrix_rank", "singular values above the largest times N times machine epsilon", "d", "", _WHOLE),
    Column("rank_loss", "singular values at or below that", "d", "", _WHOLE),
    Column("weak_rank_loss", "eigenvalues below 1e-6", "d", "", _WHOLE),
    Column("sv_max", "largest singular value", ".4g", "", _WHOLE),
    Column("sv_min", "smallest singular value", ".3g", "", _WHOLE),
    Column("mp_sigma", "deviation of an entry that fits the bulk to the Marchenko-Pastur law", ".3g", "", _NOISE),
    Column("mp_min", "lower edge of that bulk", ".4g", "", _NOISE),
    Column("mp_max", "upper edge of that bulk", ".4g", "", _NOISE),
    Column("mp_spikes", "eigenvalues beyond it, by more than its fluctuation", "d", "spikes", _NOISE),
    Column("rand_distance", "Jensen-Shannon distance from the spectrum of the shuffled matrix", ".3f", "", _NOISE),
    Column("max_rand_eval", "largest eigenvalue of the shuffled matrix", ".4g", "", _NOISE),
    Column("ww_softrank", "max_rand_eval / spectral_norm", ".3f", "", _NOISE),
)
BY_NAME = {column.name: column for column in COLUMNS}
