"""Axes, matrices and windows by example; `faults/test_properties.py` has what holds for all."""

import numpy as np
import pytest

from farms_jax import FLAX_AXES, TORCH_AXES, Axes, Window
from farms_jax._axes import as_matrices
from farms_jax._windows import make_grid

RNG = np.random.default_rng(0)


def test_kernel_becomes_one_matrix_per_position():
    kernel = RNG.standard_normal((3, 2, 4, 5))  # (height, width, in, out)
    (stack,) = as_matrices(kernel, FLAX_AXES.of(4))
    assert stack.shape == FLAX_AXES.of(4).matrices_shape(kernel.shape)[1:] == (6, 5, 4)
    np.testing.assert_array_equal(stack[2 * 2 + 1], kernel[2, 1].T)
    np.testing.assert_array_equal(stack, as_matrices(kernel.transpose(3, 2, 0, 1), TORCH_AXES.of(4))[0])


def test_axes_must_differ():
    with pytest.raises(ValueError, match="rows and cols must be different"):
        Axes(1, 1)


@pytest.mark.parametrize(
    ("window", "shape", "size"),
    [
        (Window(), (100, 512), (100, 100)),  # the smaller dimension
        (Window(), (512, 10), (10, 10)),
        (Window(rows=100), (10, 64), (10, 10)),  # larger than the matrix: the largest of the same aspect ratio
        (Window(aspect_ratio=2.0), (100, 50), (25, 50)),
        (Window(aspect_ratio=0.5), (100, 80), (100, 50)),
        (Window(rows=100, aspect_ratio=1.15), (400, 400), (100, 114)),  # int() truncates
        (Window(rows=8), (1, 30), (1, 1)),
        (None, (7, 9), (7, 9)),
    ],
)
def test_window_size(window, shape, size):
    grid = make_grid(window, (1, *shape), is_kernel=False)
    assert (grid.rows, grid.cols) == size


def test_documented_grid():
    grid = make_grid(Window(rows=50, per_axis=4), (1, 200, 100), is_kernel=False)
    assert sorted({i for i, _ in grid.starts}) == [0, 50, 100, 150]
    assert sorted({j for _, j in grid.starts}) == [0, 16, 32, 48]


def test_kernel_divisions_ignore_the_matrix_grid():
    for window in (Window(), Window(rows=3, stride=1), Window(per_axis=2)):
        grid = make_grid(window, (9, 48, 20), is_kernel=True)
        assert (grid.rows, grid.cols, grid.divisions, grid.starts) == (20, 20, 2, ((0, 0), (20, 0)))
        assert make_grid(window, (9, 20, 48), is_kernel=True).transposed


def test_pooling_joins_positions_and_windows_of_a_division():
    grid = make_grid(Window(min_division=1), (2, 6, 3), is_kernel=True)  # K=2, D=2, three eigenvalues a window
    values = np.arange(12).reshape(4, 3)  # windows: position 0 division 0, position 0 division 1, position 1 ...
    assert grid.num_eigenvalues(2) == 6
    np.testing.assert_array_equal(grid.pool(values), [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows must be a whole number of at least 1, got 0"),
        ({"stride": 1.5}, "stride must be a whole number"),
        ({"aspect_ratio": 0}, "aspect_ratio must be above 0"),
        ({"stride": 2, "per_axis": 3}, "not both"),
        ({"divisions": "max"}, "'mean' or 'pooled', got 'max'"),
    ],
)
def test_window_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Window(**settings)
