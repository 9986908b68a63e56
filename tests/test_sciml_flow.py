"""The flow solver against exact solutions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sciml.flow import DENSITY, PRESSURE, VX, VY, Gas, _hllc, simulate
from sciml.initial import random_state

GAMMA = 5 / 3
STILL = Gas(eta=0.0, zeta=0.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def grid(size):
    return np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")


def order(errors):
    return np.log2(errors[-2] / errors[-1])


def vortex(size, time):
    """The isentropic vortex, an exact solution of the equations without viscosity, carried along the diagonal."""
    x, y = ((axis - time) % 1 - 0.5 for axis in grid(size))
    width, strength = 0.08, 0.6
    bell = np.exp((1 - (x**2 + y**2) / width**2) / 2)
    temperature = 1 - (GAMMA - 1) / (2 * GAMMA) * strength**2 * bell**2
    density = temperature ** (1 / (GAMMA - 1))
    return np.stack(
        [1 - strength * bell * y / width, 1 + strength * bell * x / width, density, density * temperature], -1
    )


@pytest.mark.slow
def test_second_order_without_viscosity():
    errors = []
    for size in (64, 128):
        last = simulate(jnp.array(vortex(size, 0)), STILL, jnp.array([0, 0.1]))[-1]
        errors.append(np.abs(np.asarray(last) - vortex(size, 0.1)).mean((0, 1)))
    assert np.all(order(errors) > 1.8), order(errors)


def damped_waves(size, time, eta, zeta):
    """A shear wave and a sound wave along the diagonal, so weak (1e-6) that the linear solution is exact."""
    small, density, pressure = 1e-6, 1.5, 0.9
    x, y = grid(size)
    k = 2 * np.pi * np.sqrt(2)
    phase = 2 * np.pi * (x + y)
    shear = small * np.sin(phase) * np.exp(-eta / density * k**2 * time)
    # omega^2 + i omega nu k^2 = c^2 k^2 for waves exp(i (k x - omega t)) of a gas without heat conduction
    nu, c2 = (4 / 3 * eta + zeta) / density, GAMMA * pressure / density
    omega = -0.5j * nu * k**2 + np.sqrt(c2 * k**2 - (nu * k**2 / 2) ** 2)
    wave = small * np.exp(1j * (phase - omega * time))
    along, squeeze = wave.real, (wave * k / omega).real  # velocity and relative density
    fields = [(along + shear) / np.sqrt(2), (along - shear) / np.sqrt(2), density * (1 + squeeze)]
    return np.stack([*fields, pressure * (1 + GAMMA * squeeze)], -1)


@pytest.mark.slow
def test_second_order_with_both_viscosities():
    eta, zeta = 0.05, 0.08  # the shear wave loses a tenth, the sound wave a fifth; viscous steps take up to 7 stages
    errors = []
    for size in (64, 128):
        last = simulate(jnp.array(damped_waves(size, 0, eta, zeta)), Gas(eta, zeta), jnp.array([0, 0.05]))[-1]
        errors.append(np.abs(np.asarray(last) - damped_waves(size, 0.05, eta, zeta)).mean((0, 1)) / 1e-6)
    assert np.all(order(errors) > 1.8), order(errors)
    assert np.all(errors[-1] < 2e-3), errors


@pytest.mark.slow
def test_viscous_stress_heats_where_it_acts():
    eta, time, k = 0.05, 0.005, 2 * np.pi  # long before sound evens the heat out
    x, _ = grid(64)
    initial = np.stack([0 * x, np.sin(k * x), 1 + 0 * x, 1 + 0 * x], -1)
    last = np.asarray(simulate(jnp.array(initial), Gas(eta, 0.3), jnp.array([0, time]))[-1])
    heat = np.cos(k * x) ** 2 * (1 - np.exp(-2 * eta * k**2 * time)) / 2  # of eta (dvy/dx)^2, integrated
    np.testing.assert_allclose(last[..., PRESSURE] - 1, (GAMMA - 1) * heat, atol=0.01 * (GAMMA - 1) * heat.max())


def totals(fields):
    vx, vy, density, pressure = np.moveaxis(np.asarray(fields), -1, 0)
    energy = pressure / (GAMMA - 1) + density * (vx**2 + vy**2) / 2
    return np.stack([density * vx, density * vy, density, energy]).sum((-2, -1))


@pytest.mark.slow
def test_conserves_mass_momenta_and_energy():
    initial = random_state(jax.random.key(0), 32, 1.0)
    last = simulate(initial, Gas(0.01, 0.02), jnp.array([0, 0.5]))[-1]
    scale = np.abs(np.asarray(initial)).sum((0, 1))  # the momenta themselves nearly cancel
    before, after = totals(initial), totals(last)
    momenta = scale[[VX, VY]] * scale[DENSITY] / 32**2
    drift = (after - before) / np.array([*momenta, before[2], before[3]])
    assert np.abs(drift).max() < 1e-12, drift
    assert np.abs(np.asarray(last - initial)).max() > 0.01


def test_axes_are_alike():
    def swapped(fields):
        return fields[..., jnp.array([1, 0, 2, 3])].swapaxes(-3, -2)

    initial, gas, times = random_state(jax.random.key(3), 32, 1.0), Gas(0.01, 0.02), jnp.array([0, 0.2])
    other = simulate(swapped(initial), gas, times)
    np.testing.assert_allclose(swapped(simulate(initial, gas, times)), other, rtol=1e-10, atol=1e-10)


def test_a_state_that_breaks_down_is_nan_from_then_on():
    broken = random_state(jax.random.key(0), 32, 0.1).at[3, 4, PRESSURE].set(-1e-3)
    fields = np.asarray(simulate(broken, Gas(0.01, 0.01), jnp.array([0, 0.1])))
    assert np.isfinite(fields[0]).all()
    assert np.isnan(fields[1]).all()


@pytest.mark.slow
def test_shock_tube():
    """Sod's, mirrored at x = 0.5; the exact states are those of Toro 2009, chapter 4 (gamma 1.4)."""
    x = (np.arange(400) + 0.5) / 400
    inner = (np.abs(x - 0.5) < 0.25)[:, None] & np.ones(4, bool)
    initial = np.stack([0 * inner, 0 * inner, np.where(inner, 1, 0.125), np.where(inner, 1, 0.1)], -1)
    last = simulate(jnp.array(initial), Gas(0.0, 0.0, gamma=1.4), jnp.array([0, 0.1]))[-1]
    vx, vy, density, pressure = np.moveaxis(np.asarray(last), -1, 0)
    right = slice(200, None)
    np.testing.assert_allclose(vx, -vx[::-1], atol=1e-12)
    np.testing.assert_allclose(vy, 0, atol=1e-12)
    assert density.min() > 0.1249 and pressure.min() > 0.0999
    between_tail_and_contact, between_contact_and_shock = (x > 0.77) & (x < 0.81), (x > 0.86) & (x < 0.915)
    for part, expected in ((between_tail_and_contact, 0.42632), (between_contact_and_shock, 0.26557)):
        np.testing.assert_allclose(density[part], expected, rtol=0.01)
        np.testing.assert_allclose(pressure[part], 0.30313, rtol=0.01)
        np.testing.assert_allclose(vx[part], 0.92745, rtol=0.01)
    front = x[right][np.argmax(density[right, 0] < (0.26557 + 0.125) / 2)]
    assert front == pytest.approx(0.75 + 1.75216 * 0.1, abs=1 / 400)


@pytest.mark.parametrize("axis", [VX, VY])
def test_hllc_flux_as_toro_writes_it(axis):
    """By another form of the same flux, in which Toro 2009, chapter 10, has the pressure beside the contact."""
    q = np.random.default_rng(5).uniform(0.1, 2, (2, 4, 1000))
    q[:, :2] = 5 * (q[:, :2] - 1.05)  # some of them supersonic, either way
    speed, density, pressure = q[:, axis], q[:, DENSITY], q[:, PRESSURE]
    sound = np.sqrt(GAMMA * pressure / density)
    s_left, s_right = (speed - sound).min(0), (speed + sound).max(0)
    s = np.stack([s_left, s_right])
    mass = density * (s - speed)
    contact = (pressure[1] - pressure[0] + mass[0] * speed[0] - mass[1] * speed[1]) / (mass[0] - mass[1])
    energy = pressure / (GAMMA - 1) + density * (q[:, VX] ** 2 + q[:, VY] ** 2) / 2
    state = np.stack([density * q[:, VX], density * q[:, VY], density, energy], 1)
    push = np.zeros((4, 1000))
    push[axis], push[3] = 1, contact
    flux = state * speed[:, None]
    flux[:, axis] += pressure
    flux[:, 3] += pressure * speed
    star_pressure = pressure + mass * (contact - speed)
    star = (contact * (s[:, None] * state - flux) + (s * star_pressure)[:, None] * push) / (s - contact)[:, None]
    expected = np.where(contact > 0, star[0], star[1])
    expected = np.where(s_left > 0, flux[0], np.where(s_right < 0, flux[1], expected))
    assert 0 < np.sum(s_left > 0) < 1000 and 0 < np.sum(s_right < 0) < 1000
    found = jax.jit(lambda left, right: _hllc(left, right, STILL, axis))(*q)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def spectrum(field):
    return np.abs(np.fft.fft2(np.asarray(field))) / field.size


@pytest.mark.slow
def test_random_states_are_distributed_as_described():
    draw = jax.jit(jax.vmap(lambda key: random_state(key, 32, 0.5)))
    states = np.asarray(draw(jax.random.split(jax.random.key(1), 200)))
    at_rest = np.abs(states[:, 0, 0, :2]).max(-1) < 1e-5
    assert 80 < at_rest.sum() < 120  # a window in one of two
    open_states = states[~at_rest]
    density, pressure = open_states[..., DENSITY].mean((1, 2)), open_states[..., PRESSURE].mean((1, 2))
    speed = np.hypot(open_states[..., VX], open_states[..., VY]).mean((1, 2))
    np.testing.assert_allclose(speed, 0.5 * np.sqrt(GAMMA * pressure / density), rtol=1e-10)
    for mean, values in ((density, open_states[..., DENSITY]), (pressure, open_states[..., PRESSURE])):
        deep = np.abs(values / mean[:, None, None] - 1).mean((1, 2))
        assert 0.01 < deep.min() < 0.03 and 0.18 < deep.max() < 0.2
    for level in (density, pressure / density):
        assert 0.1 < level.min() < 0.7 and 9.3 < level.max() < 10
    wave = np.abs(np.fft.fftfreq(32, 1 / 32))
    kept = (wave > 0) & (wave <= 4)
    power = np.mean([spectrum(state[..., VX]) ** 2 for state in open_states / speed[:, None, None, None]], 0)
    assert power[~(kept[:, None] & kept)].max() < 1e-24
    assert (power[1, 1] + power[1, -1]) / (power[4, 4] + power[4, -4]) == pytest.approx(4, rel=0.3)


def test_turbulent_states_have_no_divergence():
    state = np.asarray(jax.jit(lambda key: random_state(key, 32, 0.1, "turb"))(jax.random.key(2)))
    k = np.fft.fftfreq(32, 1 / 32)
    divergence = k[:, None] * np.fft.fft2(state[..., VX]) + k * np.fft.fft2(state[..., VY])
    assert np.abs(divergence).max() < 1e-9
    assert np.hypot(state[..., VX], state[..., VY]).mean() == pytest.approx(1)
    assert np.all(state[..., DENSITY] == 1)
    np.testing.assert_allclose(state[..., PRESSURE], 100 / GAMMA)
    assert len(np.unique(spectrum(state[..., VX]).round(12))) > 20
