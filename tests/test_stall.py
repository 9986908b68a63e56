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

PROGRAM = textwrap.dedent("""
    import jax, jax.numpy as jnp
    from flax import nnx
    import farms_jax
    from train.models import MODELS
    model = MODELS["resnet18"].build(num_classes=100, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    for _ in range(20):
        report = farms_jax.analyze(params)
        assert len(report) == 21 and bool(jnp.isfinite(report.alpha).all())
    print("finished")
""")


def _spin():
    while True:
        pass


@pytest.mark.slow
def test_twenty_analyses_of_a_full_resnet18_beside_a_busy_core():
    busy = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    busy.start()
    try:
        plain = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=plain, capture_output=True, text=True, timeout=1800, check=False
        )
    finally:
        busy.kill()
    assert done.stdout.strip() == "finished", done.stderr


@pytest.mark.slow
def test_one_core_is_enough():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + PROGRAM.replace(
        "range(20)", "range(2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1800, check=False)
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
    """Results that nobody reads are computed all the same, while the interpreter shuts down and starts no threads."""
    program = "import farms_jax, numpy; farms_jax.analyze({'m': numpy.random.default_rng(0).random((1024, 1024), 'f')})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1800, check=False)
    assert (done.returncode, done.stderr) == (0, "")
