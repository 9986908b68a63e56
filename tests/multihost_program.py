"""One of two processes of `jax.distributed`: writes what `test_multihost.py` asserts, as JSON.

python tests/multihost_program.py PORT PROCESS FILE all|late
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import farms_jax
from farms_jax._report import METRICS
from farms_jax.solvers import cpu

RNG = np.random.default_rng(0)
WEIGHTS = {
    "a": RNG.standard_normal((64, 48)).astype(np.float32),
    "a again": RNG.standard_normal((64, 48)).astype(np.float32),
    "kernel": RNG.standard_normal((3, 3, 8, 16)).astype(np.float32),
    "small": RNG.standard_normal((24, 24)).astype(np.float32),
    "stacked": RNG.standard_normal((3, 24, 32)).astype(np.float32),
    "bias": np.zeros(3, np.float32),
}
SPECS = {"a": P("x"), "a again": P("y", "x"), "kernel": P(None, None, None, ("x", "y")), "small": P(), "bias": P()}
SPECS["stacked"] = P(None, "x", "y")
STACK = {"stacked": 0}


class Lazy:
    """A weight that is read when it is asked for; without a list of what was read, its disk has gone."""

    def __init__(self, name, read):
        self.name, self.read = name, read
        self.shape, self.dtype = WEIGHTS[name].shape, WEIGHTS[name].dtype

    def __array__(self, dtype=None, copy=None):
        if self.read is None:
            raise OSError("the disk is gone")
        self.read.append(self.name)
        return WEIGHTS[self.name]

    def __getitem__(self, index):
        return np.asarray(self)[index]


def facts(report):
    """What is in a report, for JSON."""
    measures = {metric: np.asarray(getattr(report, metric)).tolist() for metric in METRICS}
    spectra = None if report.eigenvalues is None else [np.asarray(part).tolist() for part in report.eigenvalues]
    return [list(report.names), list(report.num_params), [list(pair) for pair in report.left_out], measures, spectra]


def fault(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def spread(weights):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return {
        name: jax.make_array_from_callback(
            weight.shape, NamedSharding(mesh, SPECS[name]), lambda index, weight=weight: weight[index]
        )
        for name, weight in weights.items()
    }


def late(process):
    """The first process solves its windows 35 seconds later than the second."""
    expected, solve, start = farms_jax.analyze(WEIGHTS, stack=STACK), cpu.solve, time.monotonic()

    def solve_late(*args, **settings):
        cpu.solve = solve
        time.sleep(35)
        return solve(*args, **settings)

    if process == 0:
        cpu.solve = solve_late
    alpha = np.asarray(farms_jax.analyze(spread(WEIGHTS), stack=STACK).alpha)
    return {"late": time.monotonic() - start, "alpha": alpha.tolist(), "one": np.asarray(expected.alpha).tolist()}


def every(process):
    settings = {"eigenvalues": True, "kernel_scale": 0.25, "stack": STACK}
    report, read = farms_jax.analyze(spread(WEIGHTS), **settings), []
    lazy = {name: Lazy(name, read) for name in WEIGHTS}
    results = {
        "one": facts(farms_jax.analyze(WEIGHTS, **settings)),
        "mesh": facts(report),
        "replicated": report.alpha.is_fully_replicated and not report.alpha.is_fully_addressable,
        "layers": facts(farms_jax.multihost.analyze(lazy, **settings)),
        "read": list(read),
    }
    broken = {name: weight.copy() for name, weight in WEIGHTS.items()}
    for name in ("a", "a again", "kernel"):
        broken[name].flat[7] = np.inf
    other = {"kernel_scale": 1.0 + process}
    results["faults"] = {
        "not finite": fault(lambda: farms_jax.multihost.analyze(broken)),
        "not finite on the mesh": fault(lambda: farms_jax.analyze(spread(broken))),
        "unlike settings": fault(lambda: farms_jax.multihost.analyze(WEIGHTS, **other)),
        "only in one": fault(lambda: farms_jax.multihost.analyze(WEIGHTS, exclude="b.*" if process else "no such")),
        "spread": fault(lambda: farms_jax.multihost.analyze(spread(WEIGHTS))),
    }
    lazy["a"].read = None
    results["faults"]["unreadable"] = fault(lambda: farms_jax.multihost.analyze(lazy))
    return results


def main():
    port, process = int(sys.argv[1]), int(sys.argv[2])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    Path(sys.argv[3]).write_text(json.dumps({"all": every, "late": late}[sys.argv[4]](process)))


if __name__ == "__main__":
    main()
