"""What a run's numbers depend on besides its settings and data: versions, Python, processor, devices."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("farms-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the versions of those of the packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def processor() -> dict[str, Any]:
    """Return the name of the processor and how many of its cores this process may use, ready for JSON."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.processor(), "cores": cores}


def environment(*packages: str) -> dict[str, Any]:
    """Return versions of packages (by default the trainers') and Python, and the devices JAX sees, ready for JSON."""
    return {
        "versions": installed_versions(*(packages or _PACKAGES)),
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }
