"""Settings of all tests."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Before JAX starts, and for the programs that tests start: compiling takes most of their time, running next to none.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


@pytest.fixture(scope="module")
def tests_done():
    """Numbers of the tests of a module, in a list that grows."""
    done = []
    yield done
    _drop_compiled_programs()


@pytest.fixture(autouse=True)
def drop_compiled_programs(tests_done):
    """Free what tests have compiled now and then: over a whole suite it comes to gigabytes, and few share it."""
    yield
    tests_done.append(len(tests_done))
    if len(tests_done) % 40 == 0:
        _drop_compiled_programs()


def _drop_compiled_programs():
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
