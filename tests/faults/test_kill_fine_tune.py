"""SIGKILL at random moments of fine-tuning: every run that is gone on with comes to the same end."""

from killing import assert_survives


def test_fine_tune_survives_kills(tmp_path):
    assert_survives("fine-tune", 3, tmp_path)
