"""Windows of one fixed aspect ratio over the matrices of a layer.

A dense matrix is covered by a grid of window starts: (200, 100) with `Window(rows=50, per_axis=4)`
has row starts 0, 50, 100, 150 and column starts 0, 16, 32, 48. A convolution kernel is cut into
floor(R / C) divisions of its longer axis instead (paper, section 3.3).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

DEFAULT_PER_AXIS = 10


@dataclasses.dataclass(frozen=True)
class Window:
    """Shape and grid of the windows that cut a weight matrix.

    Attributes:
        rows: rows of a window; `None` takes the largest window that fits (paper, Table 15). A window larger
            than its matrix shrinks to the largest one of the same aspect ratio. Convolution kernels do not
            use it: their windows are as large as their smaller axis.
        aspect_ratio: columns over rows, the paper's Q; a window has `int(rows * aspect_ratio)` columns.
        stride: rows and columns from one window to the next. `None` uses `per_axis`.
        per_axis: window positions on each axis, spread evenly; 10 (best in the paper's Table 6) where
            neither this nor `stride` is given.
        divisions: how the divisions of a convolution kernel make one number: `"mean"` of their alphas (paper,
            section 3.3), or `"pooled"` into one spectrum (its Table 7).
        min_division: eigenvalues that a division needs for an alpha of its own; the divisions of a kernel that have
            fewer are pooled. The reference has no such bound, as 1 has none.

    Raises:
        ValueError: a value out of its range, or both `stride` and `per_axis` given.
    """

    rows: int | None = None
    aspect_ratio: float = 1.0
    stride: int | None = None
    per_axis: int | None = None
    divisions: Literal["mean", "pooled"] = "mean"
    min_division: int = 16

    def __post_init__(self):
        for field in ("rows", "stride", "per_axis", "min_division"):
            value = getattr(self, field)
            if value is not None and (value < 1 or value != int(value)):
                raise ValueError(f"Window: {field} must be a whole number of at least 1, got {value}")
        if not self.aspect_ratio > 0:
            raise ValueError(f"Window: aspect_ratio must be above 0, got {self.aspect_ratio}")
        if self.stride is not None and self.per_axis is not None:
            raise ValueError("Window: give stride or per_axis, not both")
        if self.divisions not in {"mean", "pooled"}:
            raise ValueError(f"Window: divisions must be 'mean' or 'pooled', got {self.divisions!r}")


class Grid(NamedTuple):
    """Where the windows of one layer lie: static, hashable."""

    rows: int  # of a window
    cols: int
    starts: tuple[tuple[int, int], ...]  # (row, column) of each window, division after division
    divisions: int = 1  # D: groups of equally many windows, each with a spectrum of its own
    transposed: bool = False  # the matrices are transposed before they are cut

    @property
    def gram_rows(self) -> int:
        """Rows of a window's Gram matrix over its longer axis, and so its number of eigenvalues, n."""
        return min(self.rows, self.cols)

    def num_eigenvalues(self, positions: int) -> int:
        """Return E, the number of eigenvalues of one division, over all its windows and kernel positions."""
        return positions * len(self.starts) // self.divisions * self.gram_rows

    def window_cost(self, *, is_complex: bool) -> float:
        """Return the operations for a window's eigenvalues, up to a factor; complex ones take four times as many."""
        return float(self.gram_rows) ** 2 * max(self.rows, self.cols) * (4 if is_complex else 1)

    def pool(self, values: Any) -> Any:
        """Pool the eigenvalues (K * W, n) of all windows by division: shape (D, E), unsorted, of numpy or of jax."""
        divided = values.reshape(-1, self.divisions, len(self.starts) // self.divisions * values.shape[-1])
        return divided.swapaxes(0, 1).reshape(self.divisions, -1)


def make_grid(window: Window | None, stack_shape: tuple[int, int, int], *, is_kernel: bool) -> Grid:
    """Lay windows over a stack (K, R, C), all of them inside its matrices; `None` takes the whole matrices."""
    positions, rows, cols = stack_shape
    if window is None:
        return Grid(rows, cols, ((0, 0),))
    if is_kernel:
        return _divisions(window, positions, rows, cols)
    height, width = _fit(window, rows, cols)
    starts = [(i, j) for i in _starts(window, rows, height) for j in _starts(window, cols, width)]
    return Grid(height, width, tuple(starts))


def _fit(window: Window, rows: int, cols: int) -> tuple[int, int]:
    """Return rows and columns of the largest window within (rows, cols) that is no larger than asked."""
    height = min(rows, int(cols / window.aspect_ratio))
    if window.rows is not None:
        height = min(height, window.rows)
    height = max(height, 1)
    return height, min(max(int(height * window.aspect_ratio), 1), cols)


def _starts(window: Window, length: int, size: int) -> list[int]:
    """Return window starts on one axis: the step is rounded down, as in the reference, so the end may stay bare."""
    free = length - size
    if window.stride is not None:
        return list(range(0, free + 1, window.stride))
    per_axis = window.per_axis or DEFAULT_PER_AXIS
    if per_axis == 1:
        return [0]
    step = max(1, free // (per_axis - 1))
    return [i * step for i in range(min(per_axis, free // step + 1))]


def _divisions(window: Window, positions: int, rows: int, cols: int) -> Grid:
    """Return the grid of a convolution kernel: floor(R / C) windows down its longer axis, the remainder left out.

    Divisions with few eigenvalues are pooled: the mean of Hill's estimates from 2 or 3 numbers has no bound, and that
    of noise in a 2 x 2 kernel of one channel came out anywhere between 5 and 38.
    """
    transposed = rows < cols
    longer, shorter = max(rows, cols), min(rows, cols)
    if window.aspect_ratio > 1:
        height, width = max(1, int(shorter // window.aspect_ratio)), shorter
    else:
        height, width = shorter, max(1, int(shorter // (1 / window.aspect_ratio)))
    count = longer // shorter
    divisions = count if positions * min(height, width) >= window.min_division else 1
    return Grid(height, width, tuple((i * height, 0) for i in range(count)), divisions, transposed)
