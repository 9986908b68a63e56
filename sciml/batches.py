"""Batches of trajectories of one shape, read ahead by a thread while the model computes."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from .fields import Fields

_AHEAD = 2  # batches: one hides the reading, the second a slow spell of the disk


class Batch(NamedTuple):
    """Trajectories of a batch."""

    fields: np.ndarray  # float32, shape (B, X, Y, T, C)
    weights: np.ndarray  # float32, shape (B,): 1 for a trajectory, 0 for what fills up the last batch


def train_batches(
    fields: Fields, *, batch_size: int, steps: int, seed: int, epoch: int, first: int = 0
) -> Generator[Batch]:
    """Return batches of every trajectory once, in an order and from a first time step drawn from `seed` and `epoch`.

    Trajectories have `steps` time steps, inputs and targets together. `first` is the batch to begin with, in an epoch
    that was interrupted. The last batch is filled up with its first trajectory at weight 0. The reading thread ends
    with the iterator, also when that is left early. A trajectory that cannot be read is an InputError in its turn.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(fields))
    starts = generator.integers(0, fields.steps - steps, size=len(fields), endpoint=True)
    return _batches(fields, order, starts, steps, batch_size, first)


def test_batches(fields: Fields, *, batch_size: int) -> Generator[Batch]:
    """Return batches of whole trajectories, in order; for the last batch, the thread and errors see `train_batches`."""
    return _batches(fields, np.arange(len(fields)), np.zeros(len(fields), int), fields.steps, batch_size)


def _batches(
    fields: Fields, order: np.ndarray, starts: np.ndarray, steps: int, batch_size: int, first: int = 0
) -> Generator[Batch]:
    """Cut trajectories, in this order and each from its start, into batches, which a thread reads ahead."""

    def read(place: int) -> Batch:
        chosen = slice(place, place + batch_size)
        batch = np.empty((batch_size, *fields.size, steps, fields.channels), np.float32)
        for row, (i, start) in enumerate(zip(order[chosen], starts[chosen], strict=True)):
            batch[row] = fields.read(int(i), int(start), steps)
        count = len(order[chosen])
        batch[count:] = batch[0]
        return Batch(batch, (np.arange(batch_size) < count).astype(np.float32))

    places = iter(range(0, len(order), batch_size)[first:])
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fields") as reader:
        ahead = deque(reader.submit(read, place) for place in islice(places, _AHEAD))
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(reader.submit(read, place) for place in islice(places, 1))
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)
