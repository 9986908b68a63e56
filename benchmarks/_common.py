"""What the benchmarks share: the machine, fair timing of alternatives, and the file of results."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from farms_jax.programs.environment import installed_versions, processor
from farms_jax.programs.files import write_json

T = TypeVar("T")
SETTLE = 0.3  # seconds before each timed call: threads of the one before, OpenMP's above all, spin on for a while


def machine() -> dict[str, Any]:
    """Return processor, cores, accelerator and the versions that matter, ready for JSON."""
    import jax

    return {
        **processor(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": installed_versions("jax", "jaxlib", "flax", "numpy", "torch"),
    }


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Times one call, such as the first, which compiles.

    Args:
        function: must wait for its own results.

    Returns:
        What it gives, and its seconds.
    """
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def interleave(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times the functions in turn, A B A B ..., so that whatever else the machine does hits all of them.

    Args:
        functions: by name; each must wait for its own results. Called once untimed first.
        repeats: timed calls of each.

    Returns:
        Seconds of each call by name.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(SETTLE)
            seconds[name].append(timed(function)[1])
    return seconds


def write(path: str | Path, results: dict[str, Any]) -> None:
    """Write results as indented JSON, atomically, making the folder if need be."""
    write_json(Path(path), results)
