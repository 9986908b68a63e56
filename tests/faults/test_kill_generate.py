"""SIGKILL at random moments of generation: every run that is gone on with comes to the same end."""

import pytest
from killing import assert_survives

pytestmark = pytest.mark.slow


def test_generate_survives_kills(tmp_path):
    assert_survives("generate", 11, tmp_path)
