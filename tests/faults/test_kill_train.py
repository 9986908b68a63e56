"""SIGKILL at random moments of training: every run that is gone on with comes to the same end."""

import pytest
from killing import assert_survives

pytestmark = pytest.mark.slow


def test_train_survives_kills(tmp_path):
    assert_survives("train", 5, tmp_path)
