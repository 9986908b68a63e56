"""Trajectories: the published layouts, splits, resampling and faults."""

import tracemalloc

import h5py
import numpy as np
import pytest

from farms_jax.errors import InputError
from sciml import fields as fields_module
from sciml.fields import open_fields
from sciml.hdf5 import CHANNELS


def make_flows(count=10, steps=6, x=5, y=4, channels=4, seed=0):
    """(N, X, Y, T, C) whose every number is different."""
    return np.random.default_rng(seed).standard_normal((count, x, y, steps, channels), np.float32)


def write_pdebench(path, flows):
    """As PDEBench publishes its flows: (batch, time, x, y) per quantity, and coordinates."""
    datasets = {name: flows[..., channel].transpose(0, 3, 1, 2) for channel, name in enumerate(CHANNELS)}
    lines = {f"{axis}-coordinate": np.linspace(0, 1, flows.shape[1]) for axis in "txy"}
    return write_hdf5(path, datasets | lines)


def write_stacked(path, flows, **settings):
    """As DPOT keeps them: one dataset, with these settings of HDF5."""
    return write_hdf5(path, {"data": flows}, **settings)


def write_hdf5(path, datasets, **settings):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data, **settings)
    return path


def write_scattered(folder, flows):
    folder.mkdir(parents=True, exist_ok=True)
    for number, flow in enumerate(flows):
        write_hdf5(folder / f"data_{number}.hdf5", {"data": flow})
    return folder


every_layout = pytest.mark.parametrize("write", [write_pdebench, write_stacked, write_scattered])


def opened(path, **settings):
    return open_fields(path, **{"resolution": None, "steps_needed": 2, **settings})


def whole(fields):
    """All that a split reads, (N, X, Y, T, C)."""
    return np.stack([fields.read(i, 0, fields.steps) for i in range(len(fields))])


def bilinear(values, size):
    """Values (X, ...) at `size` cell centres along the first axis, point by point in float64."""
    old = len(values)
    points = []
    for i in range(size):
        at = min(max((2 * i + 1) * old / (2 * size) - 0.5, 0), old - 1)
        distances = np.abs(np.arange(old) - at)
        points.append(np.einsum("i,i...->...", np.maximum(1 - distances, 0), values.astype(np.float64)))
    return np.stack(points)


# Layouts


@every_layout
def test_the_first_nine_tenths_are_for_training(tmp_path, write):
    flows = make_flows(count=21)  # data_10 comes before data_2 in the alphabet
    data = opened(write(tmp_path / "flows", flows))
    np.testing.assert_array_equal(whole(data.train), flows[:18])
    np.testing.assert_array_equal(whole(data.test), flows[18:])
    assert data.name == "flows"
    assert (data.train.size, data.train.steps, data.train.channels) == ((5, 4), 6, 4)
    assert any("first 18" in note for note in data.notes)
    window = data.train.read(3, 2, 3)
    assert window.dtype == np.float32
    np.testing.assert_array_equal(window, flows[3, :, :, 2:5])


def test_train_and_test_data_may_lie_apart(tmp_path):
    flows = make_flows()
    write_scattered(tmp_path / "a" / "train", flows[:3])
    write_scattered(tmp_path / "a" / "test", flows[3:])
    train = write_stacked(tmp_path / "b" / "train.hdf5", flows[:3])
    test = write_pdebench(tmp_path / "b" / "test.hdf5", flows[3:])
    for data in (opened(tmp_path / "a"), opened(tmp_path / "b"), opened(train, test=test)):
        np.testing.assert_array_equal(whole(data.train), flows[:3])
        np.testing.assert_array_equal(whole(data.test), flows[3:])
        assert data.notes == ()


@pytest.mark.parametrize("write", [write_stacked, write_scattered])
def test_one_channel_needs_no_axis(tmp_path, write):
    flows = make_flows(channels=1)
    data = opened(write(tmp_path / "flows", flows[..., 0]), channels=1)
    np.testing.assert_array_equal(whole(data.train), flows[:9])


@pytest.mark.parametrize("stored", [np.float16, np.float64, ">f4"])
@every_layout
def test_other_floating_point_types_become_float32(tmp_path, write, stored):
    flows = make_flows().astype(stored)
    read = opened(write(tmp_path / "flows", flows)).train.read(0, 0, 6)
    assert read.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(read, flows[0].astype(np.float32))


# Subsampling


@pytest.mark.parametrize(
    ("ratio", "indices"),
    [
        (0.1, [0, 10, 20, 30]),
        (0.4, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35]),
        (0.001, [0]),
    ],
)
def test_ratio_spaces_the_training_trajectories_evenly(tmp_path, ratio, indices):
    flows = make_flows(count=40, steps=2, x=2, y=2)
    data = opened(write_stacked(tmp_path / "flows.hdf5", flows), ratio=ratio)
    np.testing.assert_array_equal(whole(data.train), flows[indices])
    np.testing.assert_array_equal(whole(data.test), flows[36:])


def test_limits_take_the_first_of_what_the_ratio_leaves(tmp_path):
    flows = make_flows(count=20)
    path = write_stacked(tmp_path / "flows.hdf5", flows)
    data = opened(path, ratio=0.5, limit_train=3, limit_test=1)
    np.testing.assert_array_equal(whole(data.train), flows[[0, 2, 4]])
    np.testing.assert_array_equal(whole(data.test), flows[18:19])
    assert any("3 of 18" in note for note in data.notes)
    assert len(opened(path, limit_train=100).train) == 18


def test_a_ratio_out_of_range_is_named(tmp_path):
    for ratio in (0, 1.5, float("nan"), 1e-9):
        with pytest.raises(InputError, match="ratio must be in"):
            opened(tmp_path / "flows.hdf5", ratio=ratio)


# Resampling


@pytest.mark.parametrize(("x", "y", "resolution"), [(9, 9, 4), (5, 12, 7), (1, 3, 2), (6, 5, 5)])
def test_resampling_is_bilinear_between_cell_centres(tmp_path, x, y, resolution):
    flows = make_flows(x=x, y=y)
    data = opened(write_pdebench(tmp_path / "flows.hdf5", flows), resolution=resolution)
    along_x = bilinear(flows[4], resolution)
    expected = np.swapaxes(bilinear(np.swapaxes(along_x, 0, 1), resolution), 0, 1)
    read = data.train.read(4, 1, 3)
    assert read.dtype == np.float32
    assert data.train.size == (resolution, resolution)
    np.testing.assert_allclose(read, expected[:, :, 1:4], atol=1e-6)
    assert any(f"{x}x{y}" in note and f"{resolution}x{resolution}" in note for note in data.notes)


def test_splits_of_two_grids_need_a_resolution(tmp_path):
    train = write_stacked(tmp_path / "a.hdf5", make_flows(x=4, y=4))
    test = write_stacked(tmp_path / "b.hdf5", make_flows(x=8, y=8))
    with pytest.raises(InputError, match=r"a\.hdf5.*b\.hdf5.*resolution"):
        opened(train, test=test)
    data = opened(train, test=test, resolution=4)
    assert data.test.read(0, 0, 1).shape == (4, 4, 1, 4)
    assert [note.split(":")[0] for note in data.notes] == ["a.hdf5 (test)"]  # the training data are on that grid


# Faults


def four(shape, **other):
    return {name: np.ones(shape, np.float32) for name in CHANNELS} | other


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"tensor": np.ones((2, 3)), "x": np.ones(3)}, r"no layout.*tensor \(2, 3\), x \(3,\)"),
        ({}, "no layout.*no datasets"),
        ({"Vx": np.ones((4, 3, 2, 2)), "Vy": np.ones((4, 3, 2, 2))}, "no layout.*Vx.*Vy"),
        (four((4, 3, 2, 2), density=np.ones((4, 3, 2, 5))), r"unequal shapes.*density \(4, 3, 2, 5\)"),
        (four((4, 3, 2, 2, 2)), "Vx.*5 axes, not 4"),
        (four((4, 3, 2, 2), pressure=np.ones((4, 3, 2, 2), int)), "pressure.*int64.*float"),
        (four((4, 3, 0, 2)), "Vx.*empty"),
        (four((0, 3, 2, 2)), "Vx.*empty"),
        ({"data": np.ones((4, 2, 2))}, "data.*3 axes, not 5 or 4"),
        ({"data": np.ones((4, 2, 2, 3, 4), complex)}, "data.*complex"),
        ({"data": np.array([b"text"])}, "data.*floating"),
        ({"data": h5py.Empty("f4")}, "data.*axes"),
        ({"data": np.ones((4, 2, 2, 3, 3))}, "data: 3 channels.*takes 4"),
        ({"data": np.ones((4, 2, 2, 3))}, "data: 1 channels.*takes 4"),
        ({"data": np.ones((4, 2, 2, 1, 4))}, "data: 1 time steps, but 2"),
        ({"data": np.ones((1, 2, 2, 3, 4))}, "one trajectory"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_the_fault(tmp_path, datasets, message):
    path = write_hdf5(tmp_path / "bad.hdf5", datasets)
    with pytest.raises(InputError, match=f"bad.hdf5.*{message}"):
        opened(path)
    with h5py.File(path.rename(tmp_path / "closed.hdf5"), "a"):  # not possible while somebody has it open
        pass


def test_files_that_are_not_there_or_not_hdf5(tmp_path):
    with pytest.raises(InputError, match="none.hdf5: No such file"):
        opened(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("not numbers")
    with pytest.raises(InputError, match="text.hdf5: not an HDF5 file"):
        opened(tmp_path / "text.hdf5")
    content = write_stacked(tmp_path / "cut.hdf5", make_flows()).read_bytes()
    for kept, message in ((len(content) // 2, "cut.hdf5.*truncated"), (0, "cut.hdf5: not an HDF5 file")):
        (tmp_path / "cut.hdf5").write_bytes(content[:kept])
        with pytest.raises(InputError, match=message):
            opened(tmp_path / "cut.hdf5")


def overwritten(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)
    return path


@pytest.mark.parametrize("word", [b"TREE", b"HEAP", b"SNOD"])
def test_a_damaged_table_of_contents_is_one_clear_error(tmp_path, word):
    path = write_stacked(tmp_path / "flows.hdf5", make_flows())
    overwritten(path, path.read_bytes().index(word), b"EERT")
    with pytest.raises(InputError, match=r"flows\.hdf5: its table of contents is damaged \(.*fetch or write") as caught:
        opened(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_file_that_claims_more_than_it_holds(tmp_path, compression):
    """Refused before memory is taken."""
    path = write_stacked(tmp_path / "flows.hdf5", make_flows(), chunks=(1, 5, 4, 6, 4), compression=compression)
    content = path.read_bytes()
    size = b"".join(n.to_bytes(8, "little") for n in (10, 5, 4, 6, 4))
    assert size in content
    path.write_bytes(content.replace(size, (1 << 30).to_bytes(8, "little") + size[8:]))
    with pytest.raises(InputError, match=r"dataset data: shape \(1073741824, 5, 4, 6, 4\) of float32 needs 2061"):
        opened(path)


def test_numbers_that_were_never_written_are_refused(tmp_path):
    with h5py.File(path := tmp_path / "flows.hdf5", "w") as file:
        file.create_dataset("data", (10, 5, 4, 6, 4), "f4")
    with pytest.raises(InputError, match="needs 19200 bytes, which the 0 bytes that are stored"):
        opened(path)


def test_numbers_may_be_packed_a_thousandfold(tmp_path):
    flows = np.ones((10, 32, 32, 20, 4), np.float32)
    settings = {"chunks": (1, *flows.shape[1:]), "compression": "gzip", "shuffle": True}
    path = write_stacked(tmp_path / "flows.hdf5", flows, **settings)
    np.testing.assert_array_equal(whole(opened(path).train), flows[:9])


@pytest.mark.parametrize("settings", [{}, {"compression": "gzip", "fletcher32": True}])
@pytest.mark.parametrize(("start", "size"), [(None, 0), (10**9, None)])
def test_a_chunk_that_is_not_in_the_file_is_refused(tmp_path, settings, start, size):
    """The library itself ends the process where a chunk with a checksum has no bytes."""
    path = write_stacked(tmp_path / "flows.hdf5", make_flows(), chunks=(1, 5, 4, 6, 4), **settings)
    with h5py.File(path) as file:
        chunk = file["data"].id.get_chunk_info(1)
    content = path.read_bytes()
    place = content.index(chunk.byte_offset.to_bytes(8, "little"))
    if start is not None:
        overwritten(path, place, start.to_bytes(8, "little"))
    else:  # its size stands before the axes of its place
        key = chunk.size.to_bytes(4, "little") + bytes(4) + (1).to_bytes(8, "little")
        overwritten(path, content.index(key), size.to_bytes(4, "little"))
    with pytest.raises(InputError, match=r"dataset data: (a chunk of shape \(1, 5, 4, 6, 4\) is not whole|shape)"):
        opened(path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="holds nothing"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        opened(tmp_path)
    gap = write_scattered(tmp_path / "gap", make_flows())
    (gap / "data_3.hdf5").unlink()
    with pytest.raises(InputError, match=r"data_3\.hdf5 is missing"):
        opened(gap)
    (gap / "data_999999999999.hdf5").write_bytes(b"")  # no list of those between
    with pytest.raises(InputError, match=r"data_3\.hdf5 is missing \(999999999990 of 1000000000000 files are\)"):
        opened(gap)
    write_scattered(tmp_path / "half" / "train", make_flows())
    with pytest.raises(InputError, match="half: has train but no test"):
        opened(tmp_path / "half")
    with pytest.raises(InputError, match="train: given for training and for testing"):
        opened(tmp_path / "half" / "train", test=tmp_path / "half" / "train")


def test_a_trajectory_of_another_size_in_a_folder_is_named(tmp_path, monkeypatch):
    folder = write_scattered(tmp_path / "f", make_flows(count=20))
    write_scattered(tmp_path / "g", make_flows(x=7))
    (tmp_path / "g" / "data_4.hdf5").replace(folder / "data_12.hdf5")  # not in a sample of 8
    for limit in (fields_module.SCAN_BYTES, 0):  # also where only a sample is read
        monkeypatch.setattr(fields_module, "SCAN_BYTES", limit)
        with pytest.raises(InputError, match=r"data_12\.hdf5.*\(7, 4, 6, 4\)"):
            opened(folder)


@pytest.mark.parametrize(
    ("write", "where", "value"),
    [
        (write_pdebench, "flows, dataset density", np.nan),
        (write_stacked, "flows, dataset data", -np.inf),
        (write_scattered, r"data_9\.hdf5, dataset data", 1e300),
    ],
)
def test_numbers_that_are_not_finite_are_found_at_opening(tmp_path, write, where, value):
    flows = make_flows().astype(np.float64)
    flows[9, 1, 2, 4, 2] = value
    with pytest.raises(InputError, match=f"{where}: trajectory 9 .*time step 4"):
        opened(write(tmp_path / "flows", flows))


def test_large_data_are_checked_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fields_module, "SCAN_BYTES", 30 * 5 * 4 * 6 * 4 * 4 - 1)
    flows = make_flows(count=30)
    flows[1, 0, 0, 3] = np.nan
    data = opened(write_stacked(tmp_path / "flows.hdf5", flows))
    assert any("8 of 30" in note for note in data.notes)
    assert np.isfinite(data.train.read(1, 0, 3)).all()
    with pytest.raises(InputError, match="trajectory 1 .*time step 3"):
        data.train.read(1, 2, 3)
    flows[0, 0, 0, 5] = np.inf  # the first and the last are in the sample
    with pytest.raises(InputError, match="trajectory 0 .*time step 5"):
        opened(write_stacked(tmp_path / "first.hdf5", flows))


def test_windows_outside_the_data_are_refused(tmp_path):
    fields = opened(write_stacked(tmp_path / "flows.hdf5", make_flows())).train
    for window in ((9, 0, 1), (0, 4, 3), (0, -1, 2), (0, 0, 0)):
        with pytest.raises(IndexError):
            fields.read(*window)


# Fingerprint and memory


def test_the_fingerprint_is_of_the_data_in_use(tmp_path):
    flows = make_flows(count=20)
    path = write_stacked(tmp_path / "flows.hdf5", flows)
    other = flows.copy()
    other[5, 2, 2, 2, 2] += 1e-3
    fingerprints = [
        opened(path).fingerprint,
        opened(path, ratio=0.5).fingerprint,
        opened(path, limit_test=1).fingerprint,
        opened(write_stacked(tmp_path / "other.hdf5", other)).fingerprint,
    ]
    assert len(set(fingerprints)) == 4
    assert len(fingerprints[0]) == 64
    copy = write_stacked(tmp_path / "elsewhere" / "copy.hdf5", flows)
    assert opened(copy).fingerprint == fingerprints[0]
    assert opened(copy, resolution=3).fingerprint == fingerprints[0]


@every_layout
def test_one_trajectory_at_a_time_is_in_memory(tmp_path, write):
    count, one = 40, 32 * 32 * 8 * 4 * 4
    path = write(tmp_path / "flows.hdf5", make_flows(count=count, x=32, y=32, steps=8))
    tracemalloc.start()
    try:
        fields = opened(path).train
        opening = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        fields.read(5, 0, 1)
        reading = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert opening < 8 * one < count * one / 4
    assert reading < one
