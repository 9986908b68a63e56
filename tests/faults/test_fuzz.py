"""Thousands of damaged files, the same ones every time: each is read, or refused in one line.

Others: `FARMS_FUZZ_SEED=1 pytest tests/faults/test_fuzz.py`; more of them: `python -m benchmarks.fuzz`. The files of
cases that fail are kept in pytest's folder; a failure names the command that reads its file again.
"""

import os

import pytest

from tests.faults.fuzz import Samples, fuzz
from tests.faults.targets import TARGETS

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FARMS_FUZZ_SEED", "0"))
FUZZED = {name: target.files for name, target in TARGETS.items() if target.files}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of all readers: one child process reads them all, which takes as long to start as many files take."""
    return fuzz({name: range(files) for name, files in FUZZED.items()}, SEED, tmp_path_factory.mktemp("failed"))


@pytest.mark.parametrize("name", FUZZED)
def test_a_damaged_file_is_read_or_refused(outcomes, name):
    outcome = outcomes[name]
    assert not outcome.failures, "\n".join(map(str, outcome.failures[:10]))
    assert outcome.read + outcome.refused == FUZZED[name]
    # The mutants are damaged, and not all of them beyond reading.
    assert outcome.refused > FUZZED[name] / 5 and outcome.read > 0


def test_the_engine_sees_what_goes_wrong(tmp_path):
    (tmp_path / "samples").mkdir()
    samples, acts = Samples("misbehaving", tmp_path / "samples"), {}
    for case in range(12):
        with samples.mutant(32, case) as (_, path):
            acts[case] = path.read_bytes()[0]
    assert sorted(set(acts.values())) == list(range(9))
    outcome = fuzz({"misbehaving": range(12)}, 32, tmp_path / "kept")["misbehaving"]
    expected = {
        1: "JSONDecodeError: 'Expecting",
        2: "MiB of memory for a file of 1 bytes",
        3: "MemoryError: 'Unable to allocate 8.00 TiB",
        4: "not one printable line: 'of two\\nlines'",
        6: "SystemExit: '3'",
        7: "the process ended with status -6",
        8: "the process ended with status -27",
    }
    found = {failure.case: failure.what for failure in outcome.failures}
    assert found.keys() == {case for case, act in acts.items() if act in expected}
    for case, what in found.items():
        assert expected[acts[case]] in what
    assert outcome.read == list(acts.values()).count(0) and outcome.refused == list(acts.values()).count(5)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    for case, act in acts.items():  # of a process that ended, no file is kept: it is made anew
        assert (kept.get(f"misbehaving-32-{case}-file.bin") == bytes([act])) == (act in {1, 2, 3, 4, 6})
    assert "tests.faults.fuzz misbehaving --seed 32 --case" in str(outcome.failures[0])
