"""What the tests that kill programs share; `python -m benchmarks.kill` does the same at any scale."""

from pathlib import Path

from benchmarks.kill import kill_program


def assert_survives(name: str, kills: int, folder: Path) -> None:
    """Every kill leaves whole files, and every killed run comes to the same end as one that nothing stopped."""
    found = kill_program(name, kills, seed=0, folder=folder)
    assert len(found.kills) == kills
    assert [fault for kill in found.kills for fault in kill.faults] == []
    assert found.differences == []
    assert any(kill.mark for kill in found.kills)  # there was something to go on from
