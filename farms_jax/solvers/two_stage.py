"""Eigenvalues of large symmetric matrices, brought to a band first and from there to tridiagonal form.

The reduction in one stage (`dsytrd`) reads the whole matrix once for every column, which is no faster than memory where
a matrix has outgrown the caches. To a band it is read once for as many columns as the band is wide, in products of
matrices, and the band stays in the caches (Bischof, Lang and Sun, "A framework for symmetric band reduction", ACM TOMS
26, 2000). LAPACK's own `dsytrd_2stage` is not among the routines that SciPy offers to other code.
"""

import numpy as np
from scipy.linalg import cython_blas, cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

from farms_jax.solvers.lapack import call

# From here on two stages were faster on every processor tried. With 2000 rows they took 0.7 of the time of one stage on
# an Intel Xeon, but 1.14 of it on another processor.
_FROM_ROWS = 4096
_WIDTH = 24  # columns: a wider band takes longer to reduce, a narrower one takes longer to reach
_ONE = np.ones(1)


def is_faster(dtype: np.dtype, rows: int) -> bool:
    """Tell whether two stages are faster than one, on one thread."""
    # In float32 they gained nothing with 2000 rows, and a seventh with 4096. BLAS's own threads gain more in one stage.
    return dtype == np.float64 and rows >= _FROM_ROWS


def symmetric_eigenvalues(matrices: np.ndarray) -> np.ndarray:
    """Return eigenvalues as `lapack.symmetric_eigenvalues` does, of float64 matrices."""
    width = max(1, min(_WIDTH, matrices.shape[1] - 1))
    values = []
    for matrix in matrices:
        columns = matrix.T  # as Fortran sees it: the lower triangle
        _reduce_to_band(columns, width)
        values.append(_band_eigenvalues(columns, width))
    return np.stack(values)


def _reduce_to_band(matrix: np.ndarray, width: int) -> None:
    """Reduce to a band of `width` diagonals below the main one, in place; entries further below are left over."""
    rows = len(matrix)
    for first in range(0, rows - width - 1, width):
        below = first + width
        v, t = _qr(matrix[below:, first:below], rows)
        rest, vt = matrix[below:, below:], np.asfortranarray(v @ t)
        product = np.zeros_like(v)
        call(cython_blas, "dsymm", b"L", b"L", *v.shape, _ONE, rest, rows, vt, len(v), _ONE, product, len(v))
        # Q = I - v t v^T turns the rest into rest - v w^T - w v^T.
        w = np.asfortranarray(product - v @ (t.T @ (v.T @ product) / 2))
        call(cython_blas, "dsyr2k", b"L", b"N", *v.shape, -_ONE, v, len(v), w, len(v), _ONE, rest, rows)


def _qr(panel: np.ndarray, leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor a panel (m, b) in place into its R; return v (m, r) and t (r, r) of Q = I - v t v^T."""
    (rows, width), count = panel.shape, min(panel.shape)
    scales, work, status = np.empty(count), np.empty(width * width), np.zeros(1, np.int64)
    call(cython_lapack, "dgeqrf", rows, width, panel, leading, scales, work, len(work), status)
    v = np.asfortranarray(np.tril(panel[:, :count], -1) + np.eye(rows, count))
    t = np.zeros((count, count), order="F")
    call(cython_lapack, "dlarft", b"F", b"C", rows, count, v, rows, scales, t, count)
    return v, t


def _band_eigenvalues(matrix: np.ndarray, width: int) -> np.ndarray:
    """Return the eigenvalues of a symmetric band matrix, given by its lower triangle."""
    rows = len(matrix)
    band = np.zeros((rows, width + 1))  # a column of the matrix's band in each row
    for offset in range(width + 1):
        band[: rows - offset, offset] = matrix.diagonal(-offset)
    diagonal, off_diagonal, work = np.empty((3, rows))
    status, sizes = np.zeros(1, np.int64), (b"N", b"L", rows, width)
    call(cython_lapack, "dsbtrd", *sizes, band, width + 1, diagonal, off_diagonal, work, 1, work, status)
    call(cython_lapack, "dsterf", rows, diagonal, off_diagonal, status)
    if status[0] != 0:
        raise np.linalg.LinAlgError(f"LAPACK dsterf returned {status[0]}")
    return diagonal
