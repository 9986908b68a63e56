"""Trajectories in HDF5 files, read one window of time at a time; three published layouts.

Every reader gives (X, Y, T, C) float32, whatever the order of axes on disk:

- "pdebench": datasets Vx, Vy, density and pressure of shape (N, T, X, Y) in one file, the compressible flows of
  PDEBench (https://doi.org/10.18419/darus-2986). Their coordinates are not needed: the grids are uniform.
- "stacked": one dataset `data` of shape (N, X, Y, T, C), or (N, X, Y, T) for one channel, as DPOT's single files.
- "scattered": a folder of data_0.hdf5, data_1.hdf5, ..., each with a dataset `data` of shape (X, Y, T, C) or
  (X, Y, T), as DPOT stores what PDEBench publishes (https://github.com/thu-ml/DPOT, data_generation/preprocess.py).
"""

import abc
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from farms_jax.errors import InputError

CHANNELS = ("Vx", "Vy", "density", "pressure")  # in the order DPOT was trained with
LAYOUTS = (
    f"datasets {', '.join(CHANNELS)} of shape (trajectory, time, x, y), a dataset `data` of shape (trajectory, x, y, "
    "time, channel), or a folder of data_0.hdf5, data_1.hdf5, ... each with `data` of shape (x, y, time, channel)"
)
_LISTED = 12  # datasets and files named in a message: enough to recognise a file by


class Source(abc.ABC):
    """Trajectories of one size, stored in one file or folder.

    Attributes:
        path: the file or folder.
        layout: "pdebench", "stacked" or "scattered".
        count: number of trajectories N.
        shape: (X, Y, T, C) of each.
        itemsize: bytes per stored number.
        datasets: names of the datasets that hold the channels: one per channel, or one for all.
    """

    layout: str

    def __init__(
        self, path: Path, count: int, shape: tuple[int, int, int, int], itemsize: int, datasets: Sequence[str]
    ):
        """Keep what is known of the trajectories."""
        self.path, self.count, self.shape, self.itemsize, self.datasets = path, count, shape, itemsize, tuple(datasets)

    @property
    def trajectory_bytes(self) -> int:
        """Bytes that one trajectory takes on disk, uncompressed."""
        return int(np.prod(self.shape)) * self.itemsize

    def file(self, index: int) -> Path:
        """Return the file that holds a trajectory."""
        del index
        return self.path

    def check(self, index: int) -> None:
        """Make sure without reading the numbers that a trajectory is there in the right shape."""
        del index

    def read(self, index: int, start: int, length: int) -> np.ndarray:
        """Read a window of time of one trajectory.

        Args:
            index: of the trajectory, in [0, count).
            start: first time step.
            length: number of time steps, at least 1.

        Returns:
            Fields of shape (X, Y, length, C), float32, all finite.

        Raises:
            IndexError: there is no such trajectory or no such window.
            InputError: the file cannot be read, or holds NaN or infinite values there.
        """
        if not (0 <= index < self.count and 0 <= start < start + length <= self.shape[2]):
            raise IndexError(f"{self.path}: no trajectory {index} with time steps {start} to {start + length - 1}")
        try:
            with np.errstate(over="ignore"):  # float64 too large for float32 is reported below, as infinite
                fields = self._load(index, start, length)
        except (OSError, RuntimeError) as error:  # h5py raises either
            raise InputError(
                f"{self.file(index)}: trajectory {index} cannot be read ({error}); the file is damaged or its disk "
                "fails, so fetch or write it again"
            ) from error
        finite = np.isfinite(fields)
        if not finite.all():
            step, channel = np.argwhere(~finite.all(axis=(0, 1)))[0]
            name = self.datasets[channel % len(self.datasets)]
            raise InputError(
                f"{self.file(index)}, dataset {name}: trajectory {index} is NaN or infinite (in float32) at time step "
                f"{start + step}; leave it out of the file, or simulate it again"
            )
        return fields

    @abc.abstractmethod
    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        """Read without checks."""

    def close(self) -> None:  # noqa: B027  a folder has nothing to close
        """Close the file; closing twice is harmless."""


class _PDEBench(Source):
    """One dataset per channel in one file, time before space."""

    layout = "pdebench"

    def __init__(self, path: Path, file: h5py.File):
        self._file, self._channels = file, [_dataset(path, file, name, (4,)) for name in CHANNELS]
        shapes = {name: channel.shape for name, channel in zip(CHANNELS, self._channels, strict=True)}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise InputError(f"{path}: datasets of unequal shapes: {listed}; the file is incomplete, so write it again")
        count, steps, *size = self._channels[0].shape
        itemsize = max(channel.dtype.itemsize for channel in self._channels)
        super().__init__(path, count, (size[0], size[1], steps, len(CHANNELS)), itemsize, CHANNELS)

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        fields = np.empty((*self.shape[:2], length, self.shape[3]), np.float32)
        for number, channel in enumerate(self._channels):
            fields[..., number] = np.moveaxis(channel[index, start : start + length], 0, -1)
        return fields

    def close(self) -> None:
        self._file.close()


class _Stacked(Source):
    """All trajectories in the dataset `data` of one file."""

    layout = "stacked"

    def __init__(self, path: Path, file: h5py.File):
        self._file, self._data = file, _dataset(path, file, "data", (5, 4))
        shape = _with_channel(self._data.shape[1:])
        super().__init__(path, self._data.shape[0], shape, self._data.dtype.itemsize, ["data"])

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        window = self._data[index, :, :, start : start + length]
        return window.reshape(*self.shape[:2], length, self.shape[3]).astype(np.float32)

    def close(self) -> None:
        self._file.close()


class _Scattered(Source):
    """One file per trajectory; each is opened to be read, since a process may not hold thousands of files open."""

    layout = "scattered"

    def __init__(self, path: Path, count: int):
        with _opened(path / "data_0.hdf5") as file:
            data = _dataset(path / "data_0.hdf5", file, "data", (4, 3))
            shape, itemsize = _with_channel(data.shape), data.dtype.itemsize
        super().__init__(path, count, shape, itemsize, ["data"])

    def file(self, index: int) -> Path:
        return self.path / f"data_{index}.hdf5"

    def check(self, index: int) -> None:
        with _opened(self.file(index)) as file:
            self._data(index, file)

    def _data(self, index: int, file: h5py.File) -> h5py.Dataset:
        data = _dataset(self.file(index), file, "data", (4, 3))
        if _with_channel(data.shape) != self.shape:
            raise InputError(
                f"{self.file(index)}, dataset data: shape {data.shape}, but data_0.hdf5 holds {self.shape}; "
                "keep trajectories of one size in a folder"
            )
        return data

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        with _opened(self.file(index)) as file:
            window = self._data(index, file)[:, :, start : start + length]
        return window.reshape(*self.shape[:2], length, self.shape[3]).astype(np.float32)


def open_source(path: Path) -> Source:
    """Open trajectories of whichever layout is there.

    Args:
        path: an HDF5 file, or a folder of data_0.hdf5, data_1.hdf5, ...

    Returns:
        The trajectories, not read yet.

    Raises:
        InputError: there are none, or they cannot be used.
    """
    if path.is_dir():
        return _Scattered(path, _count_scattered(path))
    file = _opened(path)
    try:
        if all(isinstance(file.get(name), h5py.Dataset) for name in CHANNELS):
            return _PDEBench(path, file)
        if isinstance(file.get("data"), h5py.Dataset):
            return _Stacked(path, file)
        raise InputError(f"{path}: no layout known here; it has {_listing(file)}, and expected are {LAYOUTS}")
    except (OSError, RuntimeError) as error:
        file.close()
        raise InputError(
            f"{path}: its table of contents is damaged ({error}); fetch or write the file again"
        ) from error
    except InputError:
        file.close()
        raise


def _count_scattered(folder: Path) -> int:
    """Count data_0.hdf5, data_1.hdf5, ..., which must be there without a gap."""
    names = [entry.name for entry in folder.iterdir()]
    numbers = {int(match[1]) for name in names if (match := re.fullmatch(r"data_(0|[1-9]\d*)\.hdf5", name))}
    if not numbers:
        there = ", ".join(sorted(names)[:_LISTED]) or "nothing"
        raise InputError(
            f"{folder}: holds neither data_0.hdf5, data_1.hdf5, ... nor train and test; it holds {there}. Give the "
            "folder of the trajectories, or an HDF5 file"
        )
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise InputError(
            f"{folder}: data_{missing[0]}.hdf5 is missing ({len(missing)} of {max(numbers) + 1} files are); "
            "fetch or write it, or number the files without gaps"
        )
    return len(numbers)


def _opened(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, or say why that cannot be done."""
    try:
        path.open("rb").close()  # h5py's own messages bury what the system says
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give an HDF5 file or folder that is there and can be read"
        ) from error
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: not an HDF5 file, or cut off at its start; fetch it again, or give another")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error}); if it is truncated or damaged, fetch or write it again"
        ) from error


def _dataset(path: Path, file: h5py.File, name: str, axes: tuple[int, ...]) -> h5py.Dataset:
    """Return a dataset of floating point numbers with as many axes as one of `axes`, and none of them empty."""
    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        raise InputError(f"{path}: no dataset {name}; it has {_listing(file)}, and expected are {LAYOUTS}")
    where, shape = f"{path}, dataset {name}", data.shape or ()
    if data.dtype.kind != "f":
        raise InputError(f"{where}: holds {data.dtype}, not floating point numbers; store it as float32")
    if len(shape) not in axes:
        wanted = " or ".join(map(str, axes))
        raise InputError(f"{where}: shape {shape} has {len(shape)} axes, not {wanted}; expected are {LAYOUTS}")
    if 0 in shape:
        raise InputError(f"{where}: shape {shape} is empty; write the file again with at least one entry on each axis")
    return data


def _with_channel(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Shape of a trajectory stored as (X, Y, T, C), or as (X, Y, T) for one channel."""
    x, y, steps, *channels = shape
    return x, y, steps, channels[0] if channels else 1


def _listing(file: h5py.File) -> str:
    """Datasets and groups at the top of a file, with shapes; the first ones if there are many."""
    items = ((name, file.get(name)) for name in islice(file, _LISTED))
    shown = [f"{name} {item.shape}" if isinstance(item, h5py.Dataset) else f"{name}/" for name, item in items]
    return ", ".join(shown) + (", ..." if len(file) > _LISTED else "") if shown else "no datasets"
