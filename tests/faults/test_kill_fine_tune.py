"""SIGKILL at random moments of fine-tuning: every run that is gone on with comes to the same end."""

import pytest
from killing import assert_survives

pytestmark = pytest.mark.slow


def test_fine_tune_survives_kills(tmp_path):
    assert_survives("fine-tune", 3, tmp_path)
