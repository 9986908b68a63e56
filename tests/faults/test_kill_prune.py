"""SIGKILL at random moments of pruning: every run that is gone on with comes to the same end."""

import pytest
from killing import assert_survives

pytestmark = pytest.mark.slow


def test_prune_survives_kills(tmp_path):
    assert_survives("prune", 11, tmp_path)
