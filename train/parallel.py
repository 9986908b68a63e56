"""Data parallelism: every device computes an equal share of each batch; the parameters are the same on all.

One device needs no mesh: where it is `None`, arrays stay as they are.
"""

from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from farms_jax.errors import InputError

T = TypeVar("T")
_AXIS = "batch"


def make_mesh(count: int, batch_size: int) -> Mesh | None:
    """Return a mesh of the first `count` devices, of all for 0; `None` for one device.

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


def spread(mesh: Mesh | None, array: Array) -> Array:
    """Return the array with its first axis split over the devices, inside jit; where it divides evenly.

    What is computed from the array is then split too, as XLA sees fit, with the results of one device: batch norm takes
    its statistics over the whole batch.
    """
    if mesh is None or len(array) % mesh.size:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(_AXIS)))


def on_all(mesh: Mesh | None, tree: T) -> T:
    """Copy arrays to every device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
