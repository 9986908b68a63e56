"""What a layer's weights are exactly, where they are no matrix like others: constant, orthogonal, pruned, repeated.

The spectrum alone cannot say: a row of zeros, a repeated row and a missing direction are one zero eigenvalue each.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

HEAVY, MEAN = "its weights are heavy-tailed", "its weights share a mean"
ZERO, CONSTANT, DIAGONAL = "every weight is zero", "constant", "diagonal"
IDENTITY, PERMUTATION, ORTHOGONAL = "the identity", "a permutation", "orthogonal"

_EQUAL = 1e-2  # of a vector: how far W W^T may turn it where singular values are equal but for rounding
_BEYOND_CHANCE = 0.1  # of what noise of that shape does to the vector
_ENTRIES = 2**16  # of a layer, looked at for its mean and the tails of its entries
_LOOKED_AT = 16  # rows that are looked at first
_DEAD = 1e-3  # of the root mean square of the rows: weight decay shrinks dead ones without end, and never to zero
_FEW_ZEROS = 0.005  # share of the weights that may be zero by rounding
_NEARLY_ALL = 0.99  # of the groups have a pattern: what is zero by chance besides
_GROUP = 4  # N:M sparsity that hardware has: 2 of 4, or 1 of 4
_SEEN = 1.1  # times the least square of a mean that is seen in a spectrum
_EXPLAINED = 0.1  # of the eigenvalue that a mean makes in noise: what the largest may be beyond it
_SCATTER = 3.0  # the same in deviations of an entry times the singular value: 99 in 100 draws of noise are within 2.5
_SQUARE, _OF_IDENTITY = 8, 0.1  # rows, and the share of the squared norm that is far beyond that by chance, 1 / rows^2
_ROUNDED = 4  # units of rounding of an entry, up to which a direction may be rounding alone


class Structure(NamedTuple):
    """What was found."""

    columns: dict[str, Any]  # `zeros`, `dead`; `structure`, which is empty for most
    live: tuple[int, int]  # rows and columns that are not zero, nor nearly


def structure_of(
    stack: np.ndarray, entries: np.ndarray, scale: float = 1.0, largest: np.ndarray | None = None
) -> Structure:
    """Return what the matrices of a layer are exactly: those of `stack`, (K, R, C), times `scale`.

    `entries` is a `sample` of them; `largest`, (K,), are the largest eigenvalues of `stack`, where they are known. Of a
    depthwise kernel it is one, of positions by channels.
    """
    filled = int(np.count_nonzero(stack))
    norms = _norms(stack)
    alive = [squares > _DEAD**2 * squares.mean() for squares in norms]
    if filled == 0:
        said = ZERO
    elif filled == stack.size and (entries == entries[0]).all() and (stack == stack.flat[0]).all():
        said = f"{CONSTANT}: every weight is {stack.flat[0] * scale:.3g}"
    else:
        said = _single(stack, filled, scale) or _orthogonal(stack)
        said = said or "; ".join([
            *_zeros(stack, norms, alive, filled),
            *_scaled_identity(stack, norms[0]),
            *_mean(stack, norms[0], scale, largest),
        ])
    dead = 1.0 if filled == 0 else max(1 - float(part.mean()) for part in alive)
    columns = {"zeros": 1 - filled / stack.size, "dead": dead, "structure": said}
    return Structure(columns, (int(alive[1].sum()), int(alive[2].sum())))


def numerical_rank(eigenvalues: np.ndarray, shape: tuple[int, ...], eps: float) -> int:
    """Return how many eigenvalues of a layer's matrices (K, R, C) the rounding of their entries does not explain.

    Rounding is noise of a few `eps` of an entry, and the largest singular value of noise is sqrt(R) + sqrt(C) times an
    entry. `eigenvalues` has any shape.
    """
    positions, rows, cols = shape
    entry = eigenvalues.sum() / (positions * rows * cols)  # mean square
    return int((eigenvalues > entry * (_ROUNDED * eps * (rows**0.5 + cols**0.5)) ** 2).sum())


def repeated(stack: np.ndarray) -> str:
    """Return which rows or columns of a layer (K, R, C) repeat others, in words; empty for none."""
    for axis, kind in ((1, "outputs"), (2, "inputs")):
        lines = np.ascontiguousarray(np.moveaxis(stack, axis, 0)).reshape(stack.shape[axis], -1)
        different = len({line.tobytes() for line in lines})
        if different < len(lines):
            return f"only {different} of {len(lines)} {kind} differ"
    return ""


def _norms(stack: np.ndarray) -> list[np.ndarray]:
    """Return the squared norms of the positions, rows and columns of a stack (K, R, C)."""
    conjugate = stack.conj() if np.iscomplexobj(stack) else stack  # it copies real ones too
    return [np.real(np.einsum(f"krc,krc->{axis}", stack, conjugate)) for axis in "krc"]


def _zeros(stack: np.ndarray, norms: list[np.ndarray], alive: list[np.ndarray], filled: int) -> Iterator[str]:
    """Yield in words where the zeros are; `alive` is which positions, rows and columns are not zero, nor nearly."""
    for squares, part, name in zip(norms, alive, ("kernel positions", "outputs", "inputs"), strict=True):
        if not part.all():
            nearly = f", or {1 / _DEAD:g} times smaller than others" if squares[~part].any() else ""
            yield f"{np.sum(~part)} of {len(part)} {name} are zero{nearly}"
    if filled < (1 - _FEW_ZEROS) * np.prod([part.sum() for part in alive]):
        share = 1 - filled / stack.size
        yield f"{share:.0%} of its weights are zero{_pattern(stack, share)}"


def _pattern(stack: np.ndarray, share: float) -> str:
    """Return which N:M pattern the zeros have: every group of 4 along an axis has as many."""
    for axis in (1, 2) if share >= 1 / _GROUP else ():
        if stack.shape[axis] % _GROUP == 0:
            groups = np.moveaxis(stack, axis, -1).reshape(-1, _GROUP)
            kept = (groups[:_ENTRIES] != 0).sum(-1)
            most = int(kept.max())
            if most < _GROUP and (kept == most).mean() > _NEARLY_ALL:
                return f" ({most}:{_GROUP})"
    return ""


def _single(stack: np.ndarray, filled: int, scale: float) -> str:
    """Return what a matrix with at most one entry in each row and column is."""
    if len(stack) > 1 or filled > min(stack.shape[1:]) or min(stack.shape[1:]) < 2:
        return ""
    rows, cols = np.nonzero(stack[0])
    if len(set(rows)) < filled or len(set(cols)) < filled or filled < min(stack.shape[1:]):
        return ""
    values = stack[0][rows, cols]
    if (rows == cols).all():
        return IDENTITY if (values * scale == 1).all() else DIAGONAL
    return PERMUTATION if (values * scale == 1).all() else f"{DIAGONAL} but for the order of its rows"


def _orthogonal(stack: np.ndarray) -> str:
    """Return that rows or columns are orthogonal and equally long; a kernel is flattened, as initialisers do."""
    views = [stack[0]] if len(stack) == 1 else [np.moveaxis(stack, axis, 0) for axis in (1, 2)]
    for view in views:
        short, long = sorted((len(view), view.size // len(view)))
        bound = min(_EQUAL, _BEYOND_CHANCE * (short / long) ** 0.5)
        if short > 1 and _equal(_lines(view, _LOOKED_AT), bound) and _equal(_lines(view, short), bound):
            return f"{ORTHOGONAL}: all singular values are equal"
    return ""


def _lines(view: np.ndarray, count: int) -> np.ndarray:
    """Return the first lines, on the shorter axis, of the matrix that has a row for each of the first axis."""
    if len(view) ** 2 <= view.size:
        view = view[:count]  # before a kernel is copied
        return view.reshape(len(view), -1)
    return view.reshape(len(view), -1).T[:count]


def _equal(lines: np.ndarray, bound: float) -> bool:
    """Return whether all singular values of W, (R, C), R <= C, are equal: W W^T turns no vector then."""
    vector = np.random.default_rng(len(lines)).standard_normal(len(lines)).astype(np.real(lines).dtype)
    conjugate = lines.conj() if np.iscomplexobj(lines) else lines  # it copies real ones too
    turned = lines @ (vector @ conjugate)
    turned = turned.astype(np.result_type(turned, np.float64))  # its square may be out of range of float32
    scale = (vector @ turned) / (vector @ vector)
    return bool(
        abs(scale) > 0 and np.linalg.norm(turned - scale * vector) < bound * abs(scale) * np.linalg.norm(vector)
    )


def _scaled_identity(stack: np.ndarray, norms: np.ndarray) -> Iterator[str]:
    """Yield how much of a square matrix is a multiple of the identity, as where a residual layer starts from it."""
    rows, cols = stack.shape[1:]
    if len(stack) == 1 and rows == cols >= _SQUARE:
        share = abs(np.trace(stack[0], dtype=np.result_type(stack.dtype, np.float64))) ** 2 / rows / float(norms[0])
        if share > _OF_IDENTITY:
            yield f"a multiple of the identity is {share:.0%} of its norm"


def _mean(stack: np.ndarray, norms: np.ndarray, scale: float, largest: np.ndarray | None) -> Iterator[str]:
    r"""Yield that the entries share a mean, where that explains the largest eigenvalue.

    A mean m in R x C entries of deviation s has the eigenvalue t = R C m^2, which noise moves to
    (t + R s^2) (t + C s^2) / t, beyond the bulk from t = sqrt(R C) s^2 on (Baik, Ben Arous and Peche 2005). Where the
    largest eigenvalue is well beyond that, by more than its scatter of some s times its root, other directions make it.
    """
    if largest is None or np.iscomplexobj(stack):
        return
    if len(largest) < len(stack):
        stack, norms = stack.reshape(1, len(stack), -1), norms.sum(keepdims=True)
    first = int(largest.argmax())
    rows, cols = stack.shape[1:]
    means = stack.mean((1, 2), np.float64)
    mean, size = float(means[first]), rows * cols
    made, variance = size * mean**2, max(float(norms[first]) / size - mean**2, 0.0)
    if made > _SEEN * variance * size**0.5:
        moved = (made + rows * variance) * (made + cols * variance) / made
        if largest[first] <= moved + max(_EXPLAINED * moved, _SCATTER * (moved * variance) ** 0.5):
            common = float(means.mean())
            if abs(common - mean) < abs(mean) / 2:
                yield f"{MEAN} of {common * scale:.3g}"
            else:
                yield f"{MEAN} of {mean * scale:.3g} at kernel position {first}"


def sample(stack: np.ndarray) -> np.ndarray:
    """Return entries of a layer in float64: all, or `_ENTRIES` at random places."""
    if stack.size <= _ENTRIES:
        entries = stack.reshape(-1)
    else:
        rng = np.random.default_rng(0)
        entries = stack[tuple(rng.integers(size, size=_ENTRIES) for size in stack.shape)]
    return entries.astype(np.result_type(entries.dtype, np.float64))
