"""Analysis on several devices: the result of one, one layer at a time, no standstill; on 8 forced CPU devices."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from farms_jax import Window
from farms_jax._windows import make_grid
from farms_jax.solvers.mesh import _solved_once, _windows_of_process, shard_evenly

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results():
    """Devices can be forced only before JAX starts: one program makes all analyses."""
    done = subprocess.run(
        [sys.executable, "tests/sharded_program.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = ["median", "little memory", "ks, pooled", "svd", "gram64, whole", "eigenvalues", "accelerator", "training"]
CASES += ["host arrays", "arrays of one device", "two meshes", "traced", "explicit axes", "traced without a mesh"]
CASES += ["htmuon", "experts", "explicit axes without a mesh", "refreshed", "replicated"]


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_one_device(results, case):
    assert results[case] < 1e-5  # sums in float32, in another order


def test_every_device_has_the_report_in_the_precision_asked_for(results):
    assert results["on all devices"] is True
    assert results["x64"] < 1e-12


def test_inside_jit_no_device_holds_two_layers(results):
    """Six layers are analysed; of one there are copies while it is gathered, and in another order of axes."""
    assert results["temporary"] < 3 * results["layer"]
    assert results["temporary of experts"] < 3 * results["layer"]
    assert results["alpha of NaN"] == 0


def test_programs_are_compiled_once(results):
    assert results["scales differ"] == [1.0]  # those of the stack, from low to high
    assert results["step compiled"] == 1
    assert results["compiled again"] == 0  # by twenty analyses


def test_a_state_stays_on_its_devices(results):
    assert results["state on all devices"] is True


def test_the_platform_of_a_mesh_is_where_the_program_runs(results):
    assert [results[f"callback on {platform}"] for platform in ("cpu", "cuda", "tpu")] == [True, False, False]


def test_weights_that_cannot_be_analysed_are_named(results):
    assert "ValueError: analyze: a weight lies on 4 devices" in results["apart"]
    assert "another weight on 4 devices" in results["apart"]
    assert "`mesh` on 8 devices" in results["another mesh"]
    assert "jax.device_put" in results["another mesh"]
    assert results["not finite"].startswith("InputError: params: NaN or Inf in both, replicated;")


def test_a_failing_solver_fails_on_all_devices_and_leaves_none_waiting(results):
    assert "windows could not be solved: MemoryError('of this test')" in results["failing solver"]


GRIDS = [
    (Window(rows=20, per_axis=8), (1, 64, 48)),
    (Window(rows=24, aspect_ratio=0.5, stride=3), (1, 48, 64)),
    (Window(), (9, 40, 16)),
    (Window(), (1, 16, 80)),
    (None, (1, 64, 48)),
]


@pytest.mark.parametrize(("window", "shape"), GRIDS)
def test_every_window_is_in_the_part_of_one_process(window, shape):
    grid = make_grid(window, shape, is_kernel=shape[0] > 1 or shape[2] == 80)
    for count in (1, 2, 5, 11):
        solved = np.zeros((shape[0], len(grid.starts)), int)
        for number in range(count):
            positions, windows = _windows_of_process(grid, shape[0], number, count)
            solved[positions, windows] += 1
        assert (solved == 1).all()


def test_layouts_shard_the_longest_axes():
    def layout(*shape):
        return tuple(shard_evenly(shape, {"x": 4, "y": 2}))

    assert layout(64, 96) == ("y", "x")
    assert layout(32, 256) == (None, ("x", "y"))
    assert layout(12, 50) == ("x", "y")  # 50 is no multiple of 4
    assert layout(7, 9) == (None, None)
    assert layout(3, 3, 16, 128) == (None, None, None, ("x", "y"))


def test_the_first_device_solves_for_all():
    calls = []

    def fail():
        raise MemoryError("of this test")

    with ThreadPoolExecutor(3) as threads:
        for _ in range(2):  # nothing is kept once all have come
            found = threads.map(lambda _: _solved_once("key", 3, lambda: calls.append(0) or np.ones(4)), range(3))
            assert [values.sum() for values in found] == [4, 4, 4]
        failing = [threads.submit(_solved_once, "key", 3, fail) for _ in range(3)]
        assert all("of this test" in str(future.exception()) for future in failing)
    assert len(calls) == 2
