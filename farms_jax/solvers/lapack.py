"""Products and eigenvalues of single matrices by BLAS and LAPACK, called without the interpreter's lock.

`numpy.linalg.eigvalsh` took twice as long for float32 matrices of 128 to 512 rows, and SciPy's Python wrappers hold the
interpreter's lock, so that threads take turns. The routines themselves, blocked reduction to tridiagonal form (`sytrd`,
`hetrd`) and then its eigenvalues (`sterf`), and the product of a matrix with itself (`syrk`, `herk`), are reached where
SciPy offers them to other compiled code: `scipy.linalg.cython_lapack` and `cython_blas`.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

_BLOCK = 64  # columns reduced at once, as LAPACK's own choice for large matrices
_NAMES = {  # a Hermitian matrix too has a real tridiagonal form
    "f": ("ssytrd", "ssterf"),
    "d": ("dsytrd", "dsterf"),
    "F": ("chetrd", "ssterf"),
    "D": ("zhetrd", "dsterf"),
}
_PRODUCTS = {"f": ("ssyrk", b"T"), "d": ("dsyrk", b"T"), "F": ("cherk", b"C"), "D": ("zherk", b"C")}


def symmetric_eigenvalues(matrices: np.ndarray) -> np.ndarray:
    """Return eigenvalues (W, n), ascending, of symmetric or Hermitian matrices (W, n, n) of any LAPACK dtype.

    The matrices are contiguous and are overwritten; only their upper triangles are read.

    Raises:
        LinAlgError: LAPACK did not converge.
    """
    reduction, solver = _NAMES[matrices.dtype.char]
    reduce, integer = _routine(cython_lapack, reduction, 10)
    solve, _ = _routine(cython_lapack, solver, 4)
    count, n, _ = matrices.shape
    values, work = np.empty((count, n), np.finfo(matrices.dtype).dtype), np.empty((3 * n + _BLOCK * n,), matrices.dtype)
    size, work_size, info = (np.array([number], integer) for number in (n, _BLOCK * n, 0))
    pointer, length, status = size.ctypes.data, work_size.ctypes.data, info.ctypes.data
    # Addresses are advanced by hand: to wrap all arguments for each matrix, as `call` does, took 20 microseconds, four
    # times what a matrix of 8 rows takes, and a seventh of what one of 64 rows takes.
    off_diagonal = work.ctypes.data
    reflectors, scratch = off_diagonal + n * work.itemsize, off_diagonal + 2 * n * work.itemsize
    matrix, diagonal = matrices.ctypes.data, values.ctypes.data
    for _ in range(count):
        reduce(b"L", pointer, matrix, pointer, diagonal, off_diagonal, reflectors, scratch, length, status)
        if info[0] == 0:
            solve(pointer, diagonal, off_diagonal, status)
        if info[0] != 0:
            raise np.linalg.LinAlgError(f"LAPACK {reduction} or {solver} returned {info[0]}")
        matrix += matrices.strides[0]
        diagonal += values.strides[0]
    return values


def add_products(grams: np.ndarray, matrices: np.ndarray) -> None:
    """Add to Gram matrices (W, r, r) the products of matrices (W, r, c) with their conjugate transposes.

    Only the upper triangles are written. The Gram matrices are contiguous and of the matrices' dtype. Views with one
    contiguous axis, the last if they are complex, are not copied.
    """
    name, conjugated = _PRODUCTS[matrices.dtype.char]
    product, integer = _routine(cython_blas, name, 10)
    step = matrices.itemsize
    by_rows = matrices.strides[2] == step
    if not by_rows and (matrices.strides[1] != step or np.iscomplexobj(matrices)):
        matrices, by_rows = np.ascontiguousarray(matrices), True
    count, rows, cols = matrices.shape
    # Of a single row or column the stride can be anything.
    leading = max(matrices.strides[1 if by_rows else 2] // step, cols if by_rows else rows)
    sizes, one = np.array([rows, cols, leading], integer), np.ones(1, np.finfo(matrices.dtype).dtype)
    n, k, lda = (sizes[i:].ctypes.data for i in range(3))
    factor, trans = one.ctypes.data, conjugated if by_rows else b"N"  # Fortran sees the transpose of rows
    matrix, gram = matrices.ctypes.data, grams.ctypes.data
    for _ in range(count):
        product(b"L", trans, n, k, factor, matrix, lda, factor, gram, n)
        matrix += matrices.strides[0]
        gram += grams.strides[0]


def call(library: Any, name: str, *arguments: bytes | int | np.ndarray) -> None:
    """Call a routine of `cython_blas` or `cython_lapack` with Fortran's arguments; of an array it gets the address."""
    function, integer = _routine(library, name, len(arguments))
    number = ctypes.c_int32 if integer is np.int32 else ctypes.c_int64

    def passed(argument: bytes | int | np.ndarray) -> Any:
        if isinstance(argument, np.ndarray):
            return argument.ctypes.data
        return ctypes.byref(number(argument)) if isinstance(argument, int) else argument

    function(*map(passed, arguments))


@functools.cache
def _routine(library: Any, name: str, arguments: int) -> tuple[Callable[..., None], type[np.integer]]:
    """Return a routine, whose arguments are all addresses, and the type of its integers."""
    capsule = library.__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = get_name(capsule)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(get_pointer(capsule, signature))
    return function, np.int32 if b"int *" in signature else np.int64
