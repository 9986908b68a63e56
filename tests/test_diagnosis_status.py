"""One status per layer, with its reason."""

import pytest

from farms_jax.diagnosis.status import status_of

WINDOWS = {"alpha": 1.8, "alpha_low": 1.75, "alpha_high": 1.85, "noise_alpha": 2.12}
TRAINED = WINDOWS | {"ww_alpha": 3.5, "whole_stable_rank": 20.0, "whole_largest_eigenvalue": 4.0, "mp_spikes": 12}
TRAINED |= {"matrix_rank": 64, "whole_num_eigenvalues": 64}


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({}, "well trained", "alpha 1.80 (1.75 to 1.85) of the windows is below that of noise, 2.12; 12 eigenvalues"),
        ({"mp_spikes": 1}, "well trained", "1 eigenvalue beyond"),
        ({"alpha": 2.1, "alpha_high": 2.14}, "undertrained", "is that of noise, 2.12"),
        ({"alpha": 2.03, "alpha_high": 2.1}, "undertrained", "is that of noise"),
        ({"alpha": 1.9, "alpha_high": 2.1}, "well trained", "noise, 2.12, but too uncertain to exclude it"),
        ({"alpha": 2.0, "alpha_low": None, "alpha_high": None}, "well trained", "alpha 2.00 of the windows"),
        ({"ww_alpha": 1.6, "whole_stable_rank": 4.0}, "over-correlated", "the largest eigenvalue holds 25%"),
        ({"ww_alpha": 2.0}, "well trained", "below that of noise"),
        ({"whole_largest_eigenvalue": 0, "alpha": None, "ww_alpha": None}, "degenerate", "every weight is zero"),
        ({"matrix_rank": 1}, "degenerate", "rank 1 of 64: constant"),
        ({"matrix_rank": 31, "ww_alpha": 1.5}, "degenerate", "rank 31 of 64: most directions are missing"),
        ({"matrix_rank": 32}, "well trained", "below"),
        ({"alpha": None}, "degenerate", "no tail to fit"),
        ({"noise_alpha": None, "alpha": 7.0}, "undertrained", "above 6"),
        ({"noise_alpha": None, "alpha": 4.0}, "well trained", "below 6"),
    ],
)
def test_status(changes, status, reason):
    found, why = status_of(TRAINED | changes)
    assert found == status
    assert reason in why


def test_without_the_whole_matrix():
    assert status_of(WINDOWS) == (
        "well trained",
        "alpha 1.80 (1.75 to 1.85) of the windows is below that of noise, 2.12",
    )
