"""On CPU the analysis neither deadlocks nor leaves BLAS changed, whatever else the machine does."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import threadpoolctl

import farms_jax

RESNET = textwrap.dedent("""
    import jax, jax.numpy as jnp
    from flax import nnx
    import farms_jax
    from train.models import MODELS
    model = MODELS["resnet18"].build(num_classes=100, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    for _ in range(6):
        report = farms_jax.analyze(params)
        assert len(report) == 21 and bool(jnp.isfinite(report.alpha).all())
    print("finished")
""")


HOST_ARRAYS = textwrap.dedent("""
    import farms_jax, numpy
    weights = {f"w{i}": numpy.random.default_rng(i).random((256, 256), "f") for i in range(6)}
    for _ in range(10):
        farms_jax.analyze(weights).alpha.block_until_ready()
    print("finished")
""")
ONE_CORE = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"


def run(program, **settings):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, **settings)


def _spin():
    while True:
        pass


@pytest.mark.slow
def test_analyses_of_a_full_resnet18_beside_a_busy_core():
    busy = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    busy.start()
    try:
        done = run(RESNET, env={key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")})
    finally:
        busy.kill()
    assert done.stdout.strip() == "finished", done.stderr


@pytest.mark.parametrize(
    "program", [HOST_ARRAYS, pytest.param(RESNET.replace("range(6)", "range(2)"), marks=pytest.mark.slow)]
)
def test_one_core_is_enough(program):
    """XLA then has one thread, which copies arrays and runs programs."""
    done = run(ONE_CORE + program)
    assert done.stdout.strip() == "finished", done.stderr


def test_blas_threads_are_put_back():
    def threads():
        return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        farms_jax.analyze({"m": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)})
        assert threads() == before
        assert before


def test_a_program_may_end_before_its_analysis():
    """Results that nobody reads are still computed while the interpreter shuts down and starts no threads."""
    program = "import farms_jax, numpy; farms_jax.analyze({'m': numpy.random.default_rng(0).random((1024, 1024), 'f')})"
    done = run(program)
    assert (done.returncode, done.stderr) == (0, "")
