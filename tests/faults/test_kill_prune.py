"""SIGKILL at random moments of pruning: every run that is gone on with comes to the same end."""

from killing import assert_survives


def test_prune_survives_kills(tmp_path):
    assert_survives("prune", 10, tmp_path)
