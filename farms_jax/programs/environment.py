"""What a run's numbers depend on besides its settings and data: versions, Python, devices."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
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


def environment(*packages: str) -> dict[str, Any]:
    """Return versions of packages (by default the trainers') and Python, and the devices JAX sees, ready for JSON."""
    return {
        "versions": installed_versions(*(packages or _PACKAGES)),
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }
