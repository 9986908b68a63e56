"""Settings of all tests."""

import os
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("killing")
sys.path.insert(0, str(Path(__file__).parent))

# Before JAX starts, and for the programs that tests start: compiling takes most of their time, running next to none.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """Free what a module has compiled at its end: no other uses it, and over a whole suite it comes to gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
