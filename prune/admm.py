"""ADMM: which weights to keep, and their values, are found together, so that a layer's outputs change least.

The error of a layer is |(W - Z) X|^2, with W the dense weights, Z sparse ones, and X the inputs. Inputs are scaled to
unit norm first, so that a weight counts by what it contributes, as under Wanda. In turns, the weights near Z that have
the least error are found, and Z is these without their smallest. The sparsity grows over the first iterations,
until the choice stands; at last conjugate gradients find the best weights under it.

In the papers' terms, with D the dense weights, H the damped Hessian, and W + U = V what Z is chosen from: where kept,
Z = V and U = 0; elsewhere Z = 0 and U = V. So V and the mask are all that an iteration needs, and its least squares,
W = (D H + rho (Z - U)) (H + rho I)^-1, are W = D + (Z - U - D) P with P = rho (H + rho I)^-1.

References:
    Boža, Fast and Effective Weight Update for Pruned Large Language Models, TMLR 2024 (arXiv:2401.02938).
    Meng et al., ALPS, NeurIPS 2024 (arXiv:2406.07831): the conjugate gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .hessians import damped, inverse_of_lower
from .methods import Groups, lowest_of_groups, lowest_of_rows

RHO = 1.0  # penalty, of Boža's code
GROWTH = 15  # iterations over which the sparsity grows, likewise
STEPS = 20  # iterations in all, likewise
POLISH = 10  # steps of conjugate gradients, of ALPS

_multiply = functools.partial(jnp.matmul, precision="highest")


class Normal(NamedTuple):
    """A Hessian as ADMM uses it: of inputs of unit norm, damped."""

    pull: Array  # (in, in) P: how far a change of Z draws the weights after it
    hessian: Array  # (in, in) damped
    norms: Array  # (in,) of the inputs, 1 for dead ones
    dead: Array  # (in,) bool, inputs that were zero in the whole calibration
    damping: float  # that was needed, relative to the mean of the diagonal


def normalise(hessian: Array, damping: float = 0.1, layer: str = "the layer") -> Normal:
    """Return a Hessian (in, in), see `prune.forward`, scaled to inputs of unit norm, and what ADMM needs of it.

    `damping` is added to the diagonal, then 1, and raised tenfold until the factorisation succeeds.

    Raises:
        InputError: no damping up to ten times the mean helps: the calibration holds NaN, Inf or nothing.
    """
    (pull, scaled, norms, dead), damping = damped(functools.partial(_normalise, hessian), damping, layer)
    return Normal(pull, scaled, norms, dead, damping)


@jax.jit
def _normalise(hessian: Array, damping: float) -> tuple[Array, Array, Array, Array]:
    diagonal, one = jnp.diagonal(hessian), jnp.eye(len(hessian), dtype=hessian.dtype)
    dead = diagonal == 0
    norms = jnp.where(dead, 1.0, jnp.sqrt(diagonal))
    hessian = hessian / norms / norms[:, None] + jnp.where(dead, one, 0) + damping * one
    inverse = inverse_of_lower(lax.linalg.cholesky(hessian + RHO * one, symmetrize_input=False))
    return RHO * _multiply(inverse.T, inverse), hessian, norms, dead


def admm(
    weight: Array,
    normal: Normal,
    sparsity: float,
    groups: Groups | None = None,
    *,
    steps: int = STEPS,
    polish: int = POLISH,
) -> tuple[Array, Array]:
    """Return the new weight (out, in) float32, removed entries exactly 0, and the mask (out, in), True where kept.

    int(in * sparsity) weights of each row are removed; `groups` take the place of the sparsity: N of every M inputs.
    In iteration i, 1 - (1 - i / 15)^3 of that number are. Weights of dead inputs go first; those that stay are as they
    were. With nothing to remove, all are.
    """
    removed = groups.removed if groups else int(weight.shape[1] * sparsity)
    if not removed:
        return weight.astype(jnp.float32), jnp.ones(weight.shape, bool)
    return _admm(weight, *normal[:4], removed, group=groups.size if groups else 0, steps=steps, polish=polish)


@functools.partial(jax.jit, static_argnames=("group", "steps", "polish"))
def _admm(
    weight: Array,
    pull: Array,
    hessian: Array,
    norms: Array,
    dead: Array,
    removed: int,
    *,
    group: int,
    steps: int,
    polish: int,
) -> tuple[Array, Array]:
    weight = weight.astype(jnp.float32)
    dense = weight * norms

    def choose(i: Array, v: Array) -> Array:
        left = 1 - (i + 1) / GROWTH
        count = jnp.round(removed * (1 - left**3)).astype(jnp.int32)
        scores = jnp.where(dead, 0, jnp.abs(v))
        return ~(lowest_of_groups(scores, count, group) if group else lowest_of_rows(scores, count))

    def step(v: Array, mask: Array) -> Array:
        return dense + _multiply(jnp.where(mask, v, -v) - dense, pull) + jnp.where(mask, 0, v)

    def grow(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, _ = carry
        mask = choose(i, v)
        return step(v, mask), mask

    v, mask = lax.fori_loop(0, min(steps, GROWTH), grow, (dense, jnp.ones(dense.shape, bool)))
    v = lax.fori_loop(min(steps, GROWTH), steps, lambda _, v: step(v, mask), v)
    found = _polish(jnp.where(mask, v, 0), dense, mask, hessian, polish)
    return jnp.where(mask, jnp.where(dead, weight, found / norms), 0), mask


def _polish(found: Array, dense: Array, mask: Array, hessian: Array, steps: int) -> Array:
    """Return the weights under the mask after steps of conjugate gradients, each row on its own, on their error."""

    def masked_product(x: Array) -> Array:
        return jnp.where(mask, _multiply(x, hessian), 0)

    def step(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        found, residual, direction, square = carry
        product = masked_product(direction)
        length = _ratio(square, (direction * product).sum(1, keepdims=True))
        found, residual = found + length * direction, residual - length * product
        after = jnp.square(residual).sum(1, keepdims=True)
        return found, residual, residual + _ratio(after, square) * direction, after

    residual = masked_product(dense - found)
    start = found, residual, residual, jnp.square(residual).sum(1, keepdims=True)
    return lax.fori_loop(0, steps, step, start)[0]


def _ratio(a: Array, b: Array) -> Array:
    """Return a / b, 0 where b is not above 0: a row that has arrived stays."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
