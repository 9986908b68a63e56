"""SparseGPT: remove weights column by column; the columns after each are updated to compensate for what it lost.

The update of the remaining columns needs the upper Cholesky factor U of the inverse Hessian, H^-1 = U^T U. It is found
with one factorisation: if the rows and columns of H, in reverse order, are L L^T, then U is the inverse of L reversed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .hessians import damped, inverse_of_lower
from .methods import Groups, lowest, lowest_of_groups

_PART = 16  # columns at a time: few enough to stay in the cache
# Of a dead input, in place of its diagonal: scores below those of all others, in the order of the weights' magnitudes.
_DEAD = 1e12


class Factor(NamedTuple):
    """A Hessian as SparseGPT uses it."""

    upper: Array  # (in, in) upper Cholesky factor of the inverse of the damped Hessian
    dead: Array  # (in,) bool, inputs that were zero in the whole calibration
    damping: float  # that was needed, relative to the mean of the diagonal


def factorise(hessian: Array, damping: float = 0.01, layer: str = "the layer") -> Factor:
    """Return the factor of a Hessian (in, in), see `prune.forward`; dead inputs get 1 on the diagonal.

    `damping` is added to the diagonal, relative to its mean, and raised tenfold until the factorisation succeeds.

    Raises:
        InputError: no damping up to ten times the mean helps: the calibration holds NaN, Inf or nothing.
    """
    (upper, dead), damping = damped(functools.partial(_factorise, hessian), damping, layer)
    return Factor(upper, dead, damping)


@jax.jit
def _factorise(hessian: Array, damping: float) -> tuple[Array, Array]:
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    hessian += jnp.eye(len(hessian), dtype=hessian.dtype) * damping * jnp.diagonal(hessian).mean()
    lower = lax.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=False)
    return inverse_of_lower(lower)[::-1, ::-1], dead


def sparsegpt(
    weight: Array, factor: Factor, sparsity: float, groups: Groups | None = None, block: int = 128
) -> tuple[Array, Array]:
    """Return the new weight (out, in) float32, removed entries exactly 0, and the mask (out, in), True where kept.

    Columns go in blocks of `block`, a multiple of 16. At the start of one, its scores are W^2 / diag(U)^2 of the
    weights as updated so far, over all rows together; the lowest int(rows * columns * sparsity) + 1 of the block are
    removed (none at a sparsity of 0). `groups` take the place of the sparsity: each group of columns is chosen when its
    turn comes, and the block is rounded to a multiple of their size.

    Weights of dead inputs are removed first, the smallest before the others; those that the sparsity leaves stay as
    they are. (The public code sets all of them to zero, whatever the sparsity.)

    References:
        Frantar and Alistarh, SparseGPT, ICML 2023, algorithm 1; `fasterprune` of the public code.
    """
    rows, columns = weight.shape
    count, size = groups or (0, 0)
    part = size * max(_PART // size, 1) if size else _PART
    block = part * min(max(block // part, 1), -(-columns // part))
    last = columns - block * ((columns - 1) // block)
    positions = [int(rows * width * sparsity) if sparsity > 0 else -1 for width in (block, last)]
    return _sparsegpt(weight, factor.upper, factor.dead, *positions, count, block=block, part=part, group=size)


@functools.partial(jax.jit, static_argnames=("block", "part", "group"))
def _sparsegpt(
    weight: Array,
    upper: Array,
    dead: Array,
    position: int,
    last_position: int,
    count: int,
    *,
    block: int,
    part: int,
    group: int,
) -> tuple[Array, Array]:
    """Work on the transpose (in, out), whose rows are contiguous columns, padded to whole blocks."""
    columns = weight.shape[1]
    num_blocks = -(-columns // block)
    padding = num_blocks * block - columns
    work = jnp.pad(weight.astype(jnp.float32).T, ((0, padding), (0, 0)))
    # Padded columns have a 1 on the diagonal and no score: they are never chosen and change nothing.
    upper = jnp.pad(upper, ((0, padding), (0, padding)))
    # A dead input shares no entry of the Hessian with another: what is divided by its diagonal changes nothing else.
    alive = jnp.where(jnp.pad(dead, (0, padding)), _DEAD, jnp.diagonal(upper))
    diagonal = jnp.where(jnp.arange(len(upper)) < columns, alive, 1)
    real = jnp.arange(num_blocks * block) < columns

    def do_block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        work, kept = carry
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=b * block, slice_size=block)
        tile, u, d = here(work), here(upper), here(diagonal)
        if group:
            removed = jnp.zeros(tile.shape, bool)
        else:
            scores = jnp.where(here(real)[:, None], (tile / d[:, None]) ** 2, jnp.inf)
            at = jnp.where(b == num_blocks - 1, last_position, position)
            removed = lowest(scores, at) & (at >= 0)
        inner = lax.dynamic_slice_in_dim(u, b * block, block, axis=1)
        tile, removed, errors = _do_tile(tile, removed, inner, d, count, part, group)
        work = work - _right_of(u, (b + 1) * block, errors)
        work = lax.dynamic_update_slice_in_dim(work, tile, b * block, axis=0)
        return work, lax.dynamic_update_slice_in_dim(kept, ~removed, b * block, axis=0)

    work, kept = lax.fori_loop(0, num_blocks, do_block, (work, jnp.ones(work.shape, bool)))
    kept = kept[:columns].T
    return jnp.where(kept, work[:columns].T, 0), kept


def _right_of(u: Array, stop: Array, errors: Array) -> Array:
    """Return what to subtract from the columns from `stop` on, for errors (n, out) of n columns with rows u of U."""
    right = jnp.where(jnp.arange(u.shape[1]) < stop, 0, u)
    return jnp.matmul(right.T, errors, precision="highest")


def _do_tile(
    tile: Array, removed: Array, u: Array, d: Array, count: int, part: int, group: int
) -> tuple[Array, Array, Array]:
    """Return one block of columns with weights removed, the mask of the removed, and the errors, each (block, out).

    `part` columns are done at a time, which stay in the cache meanwhile. `removed`, bool, is chosen here if `group`
    (M) is not 0; `u` (block, block) is the block of the upper factor, and `d` its diagonal, 1 for padding.
    """

    def do_part(p: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tile, removed, errors = carry
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=p * part, slice_size=part)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=p * part, axis=0)
        inner = lax.dynamic_slice_in_dim(here(u), p * part, part, axis=1)
        columns, gone, paid = _do_columns(here(tile), here(removed), inner, here(d), count, group)
        tile = tile - _right_of(here(u), (p + 1) * part, paid)
        return put(tile, columns), put(removed, gone), put(errors, paid)

    return lax.fori_loop(0, len(tile) // part, do_part, (tile, removed, jnp.zeros_like(tile)))


def _do_columns(tile: Array, removed: Array, u: Array, d: Array, count: int, group: int) -> tuple[Array, Array, Array]:
    """Remove weights column by column; arguments and results are those of `_do_tile`, for a part of it."""

    def choose(i: Array, tile: Array, removed: Array) -> Array:
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=i, slice_size=group)
        scores = (here(tile) / here(d)[:, None]) ** 2
        chosen = lowest_of_groups(scores.T, count, group).T
        return lax.dynamic_update_slice_in_dim(removed, chosen, i, axis=0)

    def do_column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tile, removed, errors = carry
        if group:
            removed = lax.cond(i % group == 0, choose, lambda i, tile, removed: removed, i, tile, removed)
        error = jnp.where(removed[i], tile[i], 0) / d[i]
        return tile - u[i][:, None] * error, removed, errors.at[i].set(error)

    return lax.fori_loop(0, len(tile), do_column, (tile, removed, jnp.zeros_like(tile)))
