"""Settings of all tests."""

import os
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Before JAX starts, and for the programs that tests start: compiling takes most of their time, running next to none.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


@pytest.fixture(scope="module", autouse=True)
def compiled_for_a_module():
    """Free what a module has compiled at its end: no other uses it."""
    yield
    _drop_compiled_programs()


@pytest.fixture(autouse=True)
def compiled_so_far():
    """Free what tests have compiled whenever the process has grown by much: over a module it comes to gigabytes."""
    global _resident
    yield
    if (now := _PROCESS.memory_info().rss) > _resident + MOST_GROWTH:
        _drop_compiled_programs()
        _resident = now  # freed memory is used again, but seldom given back


def _drop_compiled_programs():
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


MOST_GROWTH = 2**28  # bytes
_PROCESS = psutil.Process()
_resident = 2**29  # of a process that has imported the tests
