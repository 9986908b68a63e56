"""Two-dimensional compressible Navier-Stokes flow of an ideal gas on the periodic unit square.

>>> import jax.numpy as jnp
>>> from sciml.flow import Gas, simulate
>>> still = jnp.ones((8, 8, 4)).at[..., :2].set(0)  # no velocity, density 1, pressure 1
>>> fields = simulate(still, Gas(eta=0.01, zeta=0.01), jnp.array([0.0, 0.05, 0.1]))
>>> fields.shape, bool(jnp.all(fields == still))
((3, 8, 8, 4), True)

The equations are (2) of Takamoto et al. 2022 (PDEBench, arXiv:2210.07182): conservation of mass, momentum and total
energy, viscous stress eta (grad v + grad v^T - 2/3 div v) + zeta div v, whose work is part of the energy flux, and no
heat conduction. Everything is a difference of fluxes through faces, so all four are conserved to rounding.

Of our own because astronomix 0.6.6, the nearest well-kept JAX package, has no viscosity in its finite volumes, no bulk
viscosity in its finite differences, and pins orbax-checkpoint below 0.11.11; JAX-Fluids is not on PyPI.

- Flow: van Leer's limited slopes of velocity, density and pressure (MUSCL), the HLLC solver at faces (Toro 2009,
  chapter 10), and two-stage strong-stability-preserving Runge-Kutta.
- Viscosity: central differences at faces and RKL2 super time steps (Meyer, Balsara and Aslam 2014), because the
  explicit limit falls with the square of the cell and with the least density, to hundreds of steps per flow step.
- Both: viscosity, flow, flow, viscosity, which is Strang's splitting and as a whole of second order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

VX, VY, DENSITY, PRESSURE = range(4)  # primitive variables; momenta, density and total energy are the conserved ones
GAMMA = 5 / 3  # of a monatomic gas, as PDEBench has it
CFL = 0.6  # cells crossed per step, both axes added, which is 0.3 along each, as PDEBench has it
_MANY = 1e5  # pairs of steps to the next output: only a state that has broken down needs more


class Gas(NamedTuple):
    """An ideal gas."""

    eta: float | Array  # shear viscosity, dynamic (density * length * speed), >= 0
    zeta: float | Array  # bulk viscosity, likewise
    gamma: float | Array = GAMMA  # ratio of specific heats, > 1


@jax.jit
def simulate(initial: Array, gas: Gas, times: Array) -> Array:
    """Return the flow at `times`, shape (T, X, Y, 4), computed in the dtype of `initial`.

    `initial`, shape (X, Y, 4), holds velocity along x and y, density > 0 and pressure > 0 at the cell centres, at the
    first of the increasing `times` (T,). Steps end on all of these exactly. From where density or pressure has become
    negative, or steps uselessly short, to the end all variables are NaN.
    """
    state = _conserved(jnp.moveaxis(initial, -1, 0), gas)

    def to_next_time(state: Array, interval: Array) -> tuple[Array, Array]:
        state, _ = lax.while_loop(lambda carry: carry[1] > 0, lambda carry: _advance(*carry, gas), (state, interval))
        return state, jnp.moveaxis(_primitive(state, gas), 0, -1)

    _, fields = lax.scan(to_next_time, state, jnp.diff(times).astype(initial.dtype))
    return jnp.concatenate([initial[None], fields])


def _advance(state: Array, remaining: Array, gas: Gas) -> tuple[Array, Array]:
    """Take two flow steps between two viscous ones; return the state and the time that remains to the output."""
    vx, vy, density, pressure = _primitive(state, gas)
    sound = jnp.sqrt(gas.gamma * pressure / density)
    cells_per_second = (jnp.abs(vx) + sound) * vx.shape[0] + (jnp.abs(vy) + sound) * vx.shape[1]
    longest = CFL / jnp.max(cells_per_second)
    pairs = jnp.ceil(remaining / (2 * longest))  # equally long: no tiny step at the end
    # NaN, here or from a negative pressure, ends the loop over steps and marks all that follows.
    pair = jnp.where(pairs < _MANY, remaining / pairs, jnp.nan)
    step = pair / 2
    state = _viscous_step(state, step, gas)
    state = _flow_step(_flow_step(state, step, gas), step, gas)
    return _viscous_step(state, step, gas), jnp.where(pairs == 1, 0, remaining - pair)


def _conserved(primitive: Array, gas: Gas) -> Array:
    """Return (momenta, density, total energy) for (vx, vy, density, pressure), shape (4, ...)."""
    vx, vy, density, pressure = primitive
    energy = pressure / (gas.gamma - 1) + density * (vx**2 + vy**2) / 2
    return jnp.stack([density * vx, density * vy, density, energy])


def _primitive(state: Array, gas: Gas) -> Array:
    """Return (vx, vy, density, pressure) for (momenta, density, total energy), shape (4, ...)."""
    mx, my, density, energy = state
    pressure = (gas.gamma - 1) * (energy - (mx**2 + my**2) / (2 * density))
    return jnp.stack([mx / density, my / density, density, pressure])


def _next(field: Array, axis: int) -> Array:
    """Return each cell's next neighbour along x (axis 0) or y (axis 1), shape (..., X, Y)."""
    return jnp.roll(field, -1, axis - 2)


def _previous(field: Array, axis: int) -> Array:
    """Return each cell's previous neighbour along x (axis 0) or y (axis 1), shape (..., X, Y)."""
    return jnp.roll(field, 1, axis - 2)


def _divergence(flux: Array, axis: int) -> Array:
    """Return what a flux through the face after each cell takes from the cell, per volume, shape (..., X, Y)."""
    return (flux - _previous(flux, axis)) * flux.shape[axis - 2]


def _flow_step(state: Array, step: Array, gas: Gas) -> Array:
    """Take one step without viscosity: two-stage strong-stability-preserving Runge-Kutta (Heun)."""

    def euler(state: Array) -> Array:
        primitive = _primitive(state, gas)
        return state - step * (_divergence(_flux(primitive, gas, 0), 0) + _divergence(_flux(primitive, gas, 1), 1))

    return (state + euler(euler(state))) / 2


def _flux(primitive: Array, gas: Gas, axis: int) -> Array:
    """Return the flux through the face after each cell along an axis, shape (4, X, Y)."""
    before, after = primitive - _previous(primitive, axis), _next(primitive, axis) - primitive
    product = before * after
    # Van Leer: the harmonic mean, at most twice the smaller difference, so that no face has a negative pressure.
    slope = jnp.where(product > 0, 2 * product / jnp.where(product > 0, before + after, 1), 0)
    return _hllc(primitive + slope / 2, _next(primitive - slope / 2, axis), gas, axis)


def _hllc(left: Array, right: Array, gas: Gas, axis: int) -> Array:
    """Return the HLLC flux between two states (vx, vy, density, pressure), shape (4, X, Y)."""
    sound_left, sound_right = (jnp.sqrt(gas.gamma * side[PRESSURE] / side[DENSITY]) for side in (left, right))
    slowest = jnp.minimum(left[axis] - sound_left, right[axis] - sound_right)
    fastest = jnp.maximum(left[axis] + sound_left, right[axis] + sound_right)
    mass_left = left[DENSITY] * (slowest - left[axis])
    mass_right = right[DENSITY] * (fastest - right[axis])
    pull = right[PRESSURE] - left[PRESSURE] + mass_left * left[axis] - mass_right * right[axis]
    contact = pull / (mass_left - mass_right)

    # Only the side that the contact moves away from matters: its flux, and the jump to the state beside the contact.
    is_left = contact >= 0
    side = jnp.where(is_left, left, right)
    wave = jnp.where(is_left, slowest, fastest)
    outgoing = jnp.where(is_left, jnp.minimum(slowest, 0), jnp.maximum(fastest, 0))
    speed, density, pressure = side[axis], side[DENSITY], side[PRESSURE]
    state = _conserved(side, gas)
    squeezed = (wave - speed) / (wave - contact)
    gain = (contact - speed) * (density * contact + pressure / (wave - speed))
    beside = (state.at[axis].set(density * contact).at[3].add(gain)) * squeezed
    flux = (state * speed).at[axis].add(pressure).at[3].add(pressure * speed)
    return flux + outgoing * (beside - state)


def _viscous_step(state: Array, step: Array, gas: Gas) -> Array:
    """Take one step of viscosity alone, which leaves the density as it is: the RKL2 of Meyer et al."""
    momenta_energy = state[jnp.array([0, 1, 3])]
    density = state[DENSITY]

    def rate(change: Array) -> Array:
        velocity = (momenta_energy[:2] + change[:2]) / density
        return _divergence(_viscous_flux(velocity, gas, 0), 0) + _divergence(_viscous_flux(velocity, gas, 1), 1)

    # The fastest mode changes sign from cell to cell along both axes; the part of the stress off its diagonal is zero.
    stiffest = 4 * (4 / 3 * gas.eta + gas.zeta) * max(density.shape) ** 2 + 4 * gas.eta * min(density.shape) ** 2
    stages = (jnp.sqrt(9 + 8 * step * stiffest / jnp.min(density)) - 1) / 2
    stages = jnp.maximum(3, 2 * jnp.ceil((stages - 1) / 2) + 1)  # odd: even ones leave the fastest mode undamped
    weight = 4 * step / (stages**2 + stages - 2)
    first = rate(jnp.zeros_like(momenta_energy))

    def stage(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        j, previous, current = carry  # both less the state at the start: a small rounding error, and shorter formulas
        b, b1, b2 = (
            jnp.where(i < 2, 1 / 3, (i * i + i - 2) / (2 * i * (i + 1))) for i in (j, j - 1, jnp.maximum(j - 2, 1))
        )
        scale = (2 * j - 1) / j * b / b1
        following = (
            scale * current - (j - 1) / j * b / b2 * previous + scale * weight * (rate(current) - (1 - b1) * first)
        )
        return j + 1, current, following

    start = (jnp.full_like(stages, 2), jnp.zeros_like(first), weight / 3 * first)
    _, _, change = lax.while_loop(lambda carry: carry[0] <= stages, stage, start)
    return state.at[jnp.array([0, 1, 3])].add(change)


def _viscous_flux(velocity: Array, gas: Gas, axis: int) -> Array:
    """Return stress and its power through the face after each cell: gains of (x, y, energy), shape (3, X, Y)."""
    other = 1 - axis
    following = _next(velocity, axis)
    face = (velocity + following) / 2
    along = (following - velocity) * velocity.shape[axis + 1]
    across = (_next(face, other) - _previous(face, other)) * (velocity.shape[other + 1] / 2)
    normal = 2 * gas.eta * along[axis] + (gas.zeta - 2 / 3 * gas.eta) * (along[axis] + across[other])
    shear = gas.eta * (across[axis] + along[other])
    x, y = (normal, shear) if axis == 0 else (shear, normal)
    return jnp.stack([x, y, x * face[0] + y * face[1]])
