"""Analysis on several devices: the result of one, no matrix gathered, no standstill; on 8 forced CPU devices."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from farms_jax import Window
from farms_jax._windows import Grid, make_grid
from farms_jax.solvers.sharded import choose_layout
from farms_jax.solvers.tiles import make_tiles

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


@pytest.mark.parametrize(
    "case",
    [
        *("median", "rounds", "peak", "ks", "svd", "gram64, whole"),
        *("host arrays", "arrays of one device", "two meshes", "explicit axes", "traced without a mesh"),
    ],
)
def test_the_result_is_that_of_one_device(results, case):
    worst, alpha = results[case]
    assert alpha < 1e-6
    assert worst < 1e-5  # a distance is a difference of numbers near 1


def test_eigenvalues_are_those_of_one_device(results):
    assert results["eigenvalues"] < 1e-6


def test_accelerators_solve_the_same_windows(results):
    assert results["accelerator"] < 1e-6


def test_double_precision_is_kept(results):
    assert results["x64"][0] < 1e-12


def test_every_device_has_the_report(results):
    assert results["on all devices"] is True


def test_inside_jit_no_device_holds_a_matrix_that_arrives_sharded(results):
    *sharded, replicated = results["largest arrays"].values()
    assert len(sharded) == 3
    assert max(sharded) <= results["matrix"] / 2
    assert replicated == results["matrix"]  # this one arrives whole, and is seen
    assert all(max(sizes) < results["matrix"] / 8 for sizes in results["gathered"].values())  # eigenvalues, fits
    assert all(sizes for sizes in results["gathered"].values())


def test_inside_jit_the_result_is_that_of_one_device(results):
    assert all(worst < 1e-6 for worst, _ in results["traced"].values())


def test_nan_inside_jit_gives_alpha_zero(results):
    assert results["alpha of NaN"] == 0


def test_tempbalance_in_a_sharded_step_trains_as_on_one_device(results):
    assert results["training"] < 1e-6
    assert results["scales differ"] > 0.5
    assert results["step compiled"] == 1


def test_a_mesh_must_hold_all_weights(results):
    assert "ValueError: analyze: a weight lies on 4 devices" in results["apart"]
    assert "another weight on 4 devices" in results["apart"]
    assert "`mesh` on 8 devices" in results["another mesh"]
    assert "jax.device_put" in results["another mesh"]


def test_sharded_weights_with_nan_are_named(results):
    assert results["not finite"].startswith("InputError: params: NaN or Inf in both, replicated;")


def test_a_failing_solver_fails_on_all_devices_and_leaves_none_waiting(results):
    assert "windows could not be solved: MemoryError('of this test')" in results["failing solver"]


def test_many_analyses_end_and_compile_once(results):
    assert results["traced twenty times"] is True
    assert results["compiled again"] == 0


def test_host_arrays_on_one_core_do_not_stand_still():
    """XLA then has one thread, which copies arrays and runs programs."""
    program = """
        import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import farms_jax, numpy
        weights = {f"w{i}": numpy.random.default_rng(i).random((256, 256), "f") for i in range(6)}
        for _ in range(10): farms_jax.analyze(weights).alpha.block_until_ready()
        print("finished")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "finished", done.stderr


GRIDS = [
    (Window(rows=20, per_axis=8), (1, 64, 48)),
    (Window(rows=12, aspect_ratio=2.0, per_axis=7), (1, 48, 64)),
    (Window(rows=24, aspect_ratio=0.5, stride=3), (1, 48, 64)),
    (Window(per_axis=9), (1, 64, 200)),
    (Window(), (9, 40, 16)),
    (None, (1, 64, 48)),
]


@pytest.mark.parametrize("most", [1, 2, 5, 100])
@pytest.mark.parametrize(("window", "shape"), GRIDS)
def test_tiles_hold_every_window_where_it_should_be(window, shape, most):
    grid = make_grid(window, shape, is_kernel=shape[0] > 1)
    tiles = make_tiles(grid, most=most)
    places = [(top + down, left + across) for top, left in tiles.starts for down, across in tiles.inner.starts]
    assert [places[number] for number in tiles.order] == list(grid.starts)
    assert len(tiles.inner.starts) <= most
    assert (tiles.inner.rows, tiles.inner.cols) == (grid.rows, grid.cols)
    ends = np.array(tiles.starts).max(0) + (tiles.rows, tiles.cols)
    assert (ends <= (shape[:0:-1] if grid.transposed else shape[1:])).all()


def test_windows_that_share_a_product_share_a_tile():
    grid = make_grid(Window(rows=20, per_axis=8), (1, 64, 48), is_kernel=False)
    assert len(make_tiles(grid, most=100).inner.starts) > 1
    uneven = Grid(20, 20, ((0, 0), (1, 0), (5, 0)))
    assert make_tiles(uneven, most=100).starts == uneven.starts


def test_layouts_have_as_many_shards_as_can_be_on_the_longest_axis():
    mesh = AbstractMesh((4, 2), ("x", "y"))

    def layout(shape, known=None, free=("x", "y")):
        return choose_layout(shape, known or ((),) * len(shape), free, mesh)

    assert layout((64, 96)) == ((), ("x", "y"))
    assert layout((96, 64)) == (("x", "y"), ())
    assert layout((12, 50)) == (("x",), ("y",))  # neither axis can have all
    assert layout((7, 9)) == ((), ())  # no mesh axis divides it, so it cannot be sharded at all
    assert layout((3, 3, 16, 64)) == ((), (), (), ("x", "y"))
    assert layout((64, 96), (("y",), ()), ("x",)) == (("y", "x"), ())  # what is known stays
    assert layout((64, 96), (("y",), ()), ()) == (("y",), ())
