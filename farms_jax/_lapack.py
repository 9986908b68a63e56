"""Eigenvalues of single symmetric or Hermitian matrices by LAPACK, called without the interpreter's lock.

`numpy.linalg.eigvalsh` took twice as long for float32 matrices of 128 to 512 rows, and SciPy's Python wrappers hold the
interpreter's lock, so that threads take turns. The routines themselves, blocked reduction to tridiagonal form (`sytrd`,
`hetrd`) and then its eigenvalues (`sterf`), are reached where SciPy offers them to other compiled code:
`scipy.linalg.cython_lapack`.
"""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
from scipy.linalg import cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

_BLOCK = 64  # columns reduced at once, as LAPACK's own choice for large matrices
_NAMES = {  # a Hermitian matrix too has a real tridiagonal form
    "f": ("ssytrd", "ssterf"),
    "d": ("dsytrd", "dsterf"),
    "F": ("chetrd", "ssterf"),
    "D": ("zhetrd", "dsterf"),
}


def symmetric_eigenvalues(matrices: np.ndarray) -> np.ndarray:
    """Eigenvalues of symmetric or Hermitian matrices, one matrix after the other.

    Args:
        matrices: shape (W, n, n), float32, float64, complex64 or complex128, contiguous; overwritten.

    Returns:
        Shape (W, n), ascending, real, of the same precision.

    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    reduce, solve, integer = _routines(matrices.dtype.char)
    count, n, _ = matrices.shape
    values, work = np.empty((count, n), np.finfo(matrices.dtype).dtype), np.empty((3 * n + _BLOCK * n,), matrices.dtype)
    size, work_size, info = (np.array([number], integer) for number in (n, _BLOCK * n, 0))
    pointer, length, status = size.ctypes.data, work_size.ctypes.data, info.ctypes.data
    off_diagonal = work.ctypes.data
    reflectors, scratch = off_diagonal + n * work.itemsize, off_diagonal + 2 * n * work.itemsize
    matrix, diagonal = matrices.ctypes.data, values.ctypes.data
    for _ in range(count):
        reduce(b"L", pointer, matrix, pointer, diagonal, off_diagonal, reflectors, scratch, length, status)
        if info[0] == 0:
            solve(pointer, diagonal, off_diagonal, status)
        if info[0] != 0:
            raise np.linalg.LinAlgError(f"LAPACK {' or '.join(_NAMES[matrices.dtype.char])} returned {info[0]}")
        matrix += matrices.strides[0]
        diagonal += values.strides[0]
    return values


@functools.cache
def _routines(precision: str) -> tuple[Callable[..., None], Callable[..., None], type[np.integer]]:
    """Reduction, solver, and the integers they take, for "f", "d", "F" or "D"."""
    reduction, solver = _NAMES[precision]
    reduce, integer = _routine(reduction, 10)
    solve, _ = _routine(solver, 4)
    return reduce, solve, integer


def _routine(name: str, arguments: int) -> tuple[Callable[..., None], type[np.integer]]:
    capsule = cython_lapack.__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = get_name(capsule)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(get_pointer(capsule, signature))
    return function, np.int32 if b"int *" in signature else np.int64
