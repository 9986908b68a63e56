"""Settings of all tests."""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Before JAX starts, and for the programs that tests start: compiling takes most of their time, running next to none.
# XLA's older way of emitting fusions compiles in two thirds of the time of the newer one. (A jaxlib that does not know
# the flag any more says so, and ends.) Level 0 would be quicker still, but the gradient of a VGG is wrong at it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false")

# What one process has compiled, the others load: workers, and programs that tests start. JAX keeps no program that
# calls back into Python, as an analysis on CPU does. A folder that the environment names serves several sessions.
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="farms_jax-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure():
    """Remove the folder, in the process that has made it: it ends after its workers."""
    if _compiled is not None:
        shutil.rmtree(_compiled, ignore_errors=True)


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The job of a finished pruning run, Wanda by FARMS on a small LLaMA, and what the run said; only to be read."""
    from prune_helpers import small_run

    from prune.job import prepare
    from prune.run import run

    job = prepare(small_run(tmp_path_factory.mktemp("run")))
    return job, run(job)


@pytest.fixture(scope="session")
def finished(finished_run):
    """The job of the finished run; only to be read."""
    return finished_run[0]


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A job for the same run in a place of its own, to be damaged."""
    from prune.job import prepare

    shutil.copytree(finished.config.out, tmp_path / "out")
    return prepare(dataclasses.replace(finished.config, out=tmp_path / "out"))


def _drop_compiled_programs():
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


MOST_GROWTH = 2**29  # bytes; with less, what the tests of a module share is compiled again and again
_PROCESS = psutil.Process()
_resident = 2**29  # of a process that has imported the tests
