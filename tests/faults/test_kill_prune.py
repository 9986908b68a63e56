"""SIGKILL at random moments of pruning: every run that is gone on with comes to the same end."""

from killing import assert_survives


def test_prune_survives_kills(tmp_path):
    assert_survives("prune", 11, tmp_path)
