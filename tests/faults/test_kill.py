"""SIGKILL at random moments: every run that is resumed ends as one that nothing stopped.

`python -m benchmarks.kill` does the same at any scale, and of fine-tuning too, whose epochs are those of training.
"""

import pytest

from benchmarks.kill import kill_program

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "kills"), [("train", 1), ("prune", 2), ("generate", 2)])
def test_a_killed_run_ends_as_one_that_was_not(name, kills, tmp_path):
    found = kill_program(name, kills, seed=0, folder=tmp_path)
    assert len(found.kills) == kills
    assert [fault for kill in found.kills for fault in kill.faults] == []
    assert found.differences == []
    assert any(kill.mark for kill in found.kills)  # there was something to resume from
