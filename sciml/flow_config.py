"""Settings of a data set of flows, and the name of its file."""

import dataclasses
from typing import Any, get_args

import numpy as np

from farms_jax.errors import InputError

from .flow import CFL, GAMMA
from .initial import InitialState

VERSION = 1  # of the numbers: to be raised with any change to flow.py or initial.py that changes them
_LEAST_SIZE = 16  # four cells for the shortest wave


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Settings of the trajectories."""

    mach: float = 0.1
    """Mach number: mean modulus of the velocity over the speed of sound at the start."""
    eta: float = 0.01
    """Shear viscosity."""
    zeta: float = 0.01
    """Bulk viscosity."""
    initial: InitialState = "rand"
    """Initial states: rand (waves in velocity, density, pressure) or turb (waves in velocity, without divergence)."""
    size: int = 128
    """Cells along each axis of the unit square."""
    steps: int = 21
    """States stored of each trajectory, the initial one among them."""
    end: float = 1.0
    """Time of the last state; the first is at 0."""
    count: int = 1000
    """Number of trajectories."""
    seed: int = 0
    """Seed of the initial states."""

    def check(self) -> None:
        """Raise an InputError if a setting is out of its range."""
        rules = [
            ("mach", 0 < self.mach < np.inf, "a number > 0"),
            ("end", 0 < self.end < np.inf, "a number > 0"),
            ("eta", 0 <= self.eta < np.inf, "a number >= 0"),
            ("zeta", 0 <= self.zeta < np.inf, "a number >= 0"),
            ("size", self.size >= _LEAST_SIZE, f"an integer >= {_LEAST_SIZE}"),
            ("steps", self.steps >= 2, "an integer >= 2"),
            ("count", self.count >= 1, "an integer >= 1"),
            ("seed", self.seed >= 0, "an integer >= 0"),
            ("seed", self.seed < 2**32, "below 2**32"),
            ("initial", self.initial in get_args(InitialState), f"one of {', '.join(get_args(InitialState))}"),
        ]
        wrong = [f"--{name} must be {rule}, got {getattr(self, name)!r}" for name, holds, rule in rules if not holds]
        if wrong:
            raise InputError("; ".join(wrong))

    def attributes(self) -> dict[str, Any]:
        """Return all settings that the numbers depend on, as HDF5 attributes; `M` is the Mach number."""
        settings = dataclasses.asdict(self)
        return {"M": settings.pop("mach"), **settings, "gamma": GAMMA, "cfl": CFL, "generator_version": VERSION}


def file_name(config: FlowConfig) -> str:
    """Return the name that PDEBench would give the file.

    >>> file_name(FlowConfig())
    '2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5'
    """
    flow = f"M{float(config.mach)}_Eta{float(config.eta)}_Zeta{float(config.zeta)}"
    return f"2D_CFD_{config.initial.capitalize()}_{flow}_periodic_{config.size}_Train.hdf5"
