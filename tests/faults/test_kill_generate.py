"""SIGKILL at random moments of generation: every run that is gone on with comes to the same end."""

from killing import assert_survives


def test_generate_survives_kills(tmp_path):
    assert_survives("generate", 11, tmp_path)
