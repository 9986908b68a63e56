"""Batches: what is in them, how they are drawn, and the thread that reads ahead."""

import threading

import h5py
import numpy as np
import pytest

from farms_jax.errors import InputError
from sciml.batches import test_batches as whole_batches, train_batches
from sciml.fields import Fields, open_fields


@pytest.fixture
def flows_and_fields(tmp_path):
    flows = np.random.default_rng(0).standard_normal((10, 5, 4, 6, 4), np.float32)  # every number is different
    with h5py.File(tmp_path / "flows.hdf5", "w") as file:
        file["data"] = flows
    data = open_fields(tmp_path / "flows.hdf5", resolution=None, steps_needed=2)
    yield flows, data
    data.train.close()
    data.test.close()


def find(window, flows):
    """Which trajectory and which first step a window was cut from."""
    steps = window.shape[2]
    places = [(i, s) for i in range(len(flows)) for s in range(flows.shape[3] - steps + 1)]
    (place,) = [(i, s) for i, s in places if np.array_equal(window, flows[i, :, :, s : s + steps])]
    return place


def epoch_of(fields, **settings):
    return list(train_batches(fields, **{"batch_size": 4, "steps": 3, "seed": 0, "epoch": 0, **settings}))


def test_an_epoch_has_every_trajectory_once(flows_and_fields):
    flows, data = flows_and_fields
    batches = epoch_of(data.train)
    assert [batch.fields.shape for batch in batches] == [(4, 5, 4, 3, 4)] * 3
    assert [batch.weights.tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert batches[0].fields.dtype == batches[0].weights.dtype == np.float32
    seen = [find(w, flows)[0] for batch in batches for w, k in zip(batch.fields, batch.weights, strict=True) if k]
    assert sorted(seen) == list(range(9))
    assert seen != sorted(seen)
    for padding in batches[2].fields[1:]:
        np.testing.assert_array_equal(padding, batches[2].fields[0])


def test_first_steps_are_uniform_over_all_that_fit(flows_and_fields):
    flows, data = flows_and_fields
    batches = [b for epoch in range(20) for b in epoch_of(data.train, batch_size=9, epoch=epoch)]
    starts = [find(window, flows)[1] for batch in batches for window in batch.fields]
    counts = np.bincount(starts)  # 180 draws of 4
    assert len(counts) == 4
    assert (counts > 25).all() and (counts < 65).all()
    assert {find(w, flows)[1] for w in epoch_of(data.train, steps=6, batch_size=9)[0].fields} == {0}


def test_epochs_are_drawn_from_seed_and_epoch(flows_and_fields):
    _, data = flows_and_fields

    def stream(**settings):
        return np.concatenate([batch.fields for batch in epoch_of(data.train, **settings)])

    np.testing.assert_array_equal(stream(seed=3, epoch=2), stream(seed=3, epoch=2))
    assert not np.array_equal(stream(seed=3, epoch=2), stream(seed=3, epoch=3))
    assert not np.array_equal(stream(seed=3, epoch=2), stream(seed=2, epoch=3))


def test_test_batches_are_whole_trajectories_in_order(flows_and_fields):
    flows, data = flows_and_fields
    batches = list(whole_batches(data.train, batch_size=4))
    np.testing.assert_array_equal(np.concatenate([b.fields for b in batches])[:9], flows[:9])
    assert [batch.weights.tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    (only,) = whole_batches(data.test, batch_size=3)
    np.testing.assert_array_equal(only.fields, flows[[9, 9, 9]])
    assert only.weights.tolist() == [1, 0, 0]


class Recorder(Fields):
    """Notes what is read and by which thread, and fails at a chosen read."""

    def __init__(self, data, fail_at=None):
        super().__init__("recorded", data.train.source, data.train.indices)
        self.reads, self.threads, self.fail_at = [], set(), fail_at

    def read(self, i, start, length):
        self.reads.append(i)
        self.threads.add(threading.current_thread())
        if len(self.reads) == self.fail_at:
            raise InputError("flows.hdf5: the disk is gone")
        return super().read(i, start, length)


def assert_reader_ended(fields):
    assert fields.threads
    assert threading.main_thread() not in fields.threads
    assert not any(thread.is_alive() for thread in fields.threads)


def test_reading_runs_two_batches_ahead_and_no_further(flows_and_fields):
    fields = Recorder(flows_and_fields[1])
    batches = train_batches(fields, batch_size=1, steps=3, seed=0, epoch=0)
    assert fields.reads == []
    next(batches)
    reader = next(iter(fields.threads))
    for _ in range(200):
        if len(fields.reads) == 3:
            break
        reader.join(0.01)
    reader.join(0.1)
    assert len(fields.reads) == 3
    assert len(list(batches)) == 8
    assert_reader_ended(fields)


def test_leaving_early_ends_the_reader(flows_and_fields):
    fields = Recorder(flows_and_fields[1])
    batches = whole_batches(fields, batch_size=1)
    next(batches)
    batches.close()
    assert_reader_ended(fields)
    assert len(fields.reads) <= 3


def test_an_error_of_the_reader_is_raised_in_its_turn(flows_and_fields):
    fields = Recorder(flows_and_fields[1], fail_at=6)
    batches = train_batches(fields, batch_size=2, steps=3, seed=0, epoch=0)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(InputError, match="the disk is gone"):
        next(batches)
    assert_reader_ended(fields)
    assert list(batches) == []
