"""Data parallelism: every device computes an equal share of each batch; the parameters are the same on all."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from farms_jax.errors import InputError

T = TypeVar("T")
Spread = Callable[[Array], Array]
_AXIS = "batch"


def unsharded(index: Array) -> Array:
    """Return the images as they are: one device computes all."""
    return index


def make_mesh(count: int, batch_size: int) -> Mesh | None:
    """Make a mesh of the first devices.

    Args:
        count: number of devices; 0 takes all.
        batch_size: images in a step.

    Returns:
        The mesh, `None` for one device.

    Raises:
        InputError: JAX sees fewer devices, or the images of a step cannot be split evenly.
    """
    devices = jax.devices()
    if not 0 <= count <= len(devices):
        raise InputError(f"--devices {count}: JAX sees {len(devices)}; give at most {len(devices)}, or 0 for all")
    chosen = devices[: count or None]
    if batch_size % len(chosen):
        raise InputError(f"--batch-size {batch_size} must be a multiple of the {len(chosen)} of --devices {count}")
    return Mesh(np.array(chosen), _AXIS) if len(chosen) > 1 else None


def spread_over(mesh: Mesh | None) -> Spread:
    """Make the function that splits the first axis of an array over the devices, inside jit, where it divides evenly.

    All that is computed from the array is then split too, as XLA sees fit, with the results of one device: batch norm
    takes its statistics over the whole batch.

    Args:
        mesh: mesh of `make_mesh`.

    Returns:
        The function; `unsharded` without a mesh.
    """
    if mesh is None:
        return unsharded
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return lambda array: jax.lax.with_sharding_constraint(array, sharding) if len(array) % mesh.size == 0 else array


def on_all(mesh: Mesh | None, tree: T) -> T:
    """Copy arrays to every device; as they are without a mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
