"""Trajectories in HDF5 files, read one window of time at a time; three published layouts.

Every reader gives (X, Y, T, C) float32, whatever the order of axes on disk:

- "pdebench": datasets Vx, Vy, density and pressure of shape (N, T, X, Y) in one file, the compressible flows of
  PDEBench (https://doi.org/10.18419/darus-2986). Their coordinates are not needed: the grids are uniform.
- "stacked": one dataset `data` of shape (N, X, Y, T, C), or (N, X, Y, T) for one channel, as DPOT's single files.
- "scattered": a folder of data_0.hdf5, data_1.hdf5, ..., each with a dataset `data` of shape (X, Y, T, C) or
  (X, Y, T), as DPOT stores what PDEBench publishes (https://github.com/thu-ml/DPOT, data_generation/preprocess.py).
"""

import abc
import contextlib
import math
import re
from collections.abc import Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from farms_jax.errors import InputError, one_line, printable, short_repr

CHANNELS = ("Vx", "Vy", "density", "pressure")  # in the order DPOT was trained with
LAYOUTS = (
    f"datasets {', '.join(CHANNELS)} of shape (trajectory, time, x, y), a dataset `data` of shape (trajectory, x, y, "
    "time, channel), or a folder of data_0.hdf5, data_1.hdf5, ... each with `data` of shape (x, y, time, channel)"
)
_FILTERS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF}
_MOST_PACKED = 1032  # bytes that one byte can stand for after these; others, such as Zstandard, have no such bound
_LEAST_PACKED = 5  # bytes: a checksum has four; the library crashes where there is nothing before it
_SLACK = 1 << 16  # bytes; for files too small for that bound to mean anything
_LISTED = 12  # datasets and files named in a message: enough to recognise a file by


class Source(abc.ABC):
    """Trajectories of one shape in one file or folder, closed by `close`."""

    layout: str  # "pdebench", "stacked" or "scattered"
    path: Path
    count: int  # trajectories N
    shape: tuple[int, int, int, int]  # (X, Y, T, C) of each
    itemsize: int  # bytes per stored number
    datasets: Sequence[str]  # names of those that hold the channels: one per channel, or one for all
    _file: h5py.File | None = None  # closed by `close`

    def file(self, index: int) -> Path:
        """Return the file that holds a trajectory."""
        return self.path

    def check(self, index: int) -> None:
        """Raise an InputError if a trajectory is missing or of another shape, without reading its numbers."""
        del index

    def read(self, index: int, start: int, length: int) -> np.ndarray:
        """Return a window of time of one trajectory, (X, Y, length, C), float32 and finite.

        Raises:
            IndexError: there is no such trajectory or no such window.
            InputError: the file cannot be read, or holds NaN or infinite values there.
        """
        if not (0 <= index < self.count and 0 <= start < start + length <= self.shape[2]):
            raise IndexError(f"{self.path}: no trajectory {index} with time steps {start} to {start + length - 1}")
        fault = f"{self.file(index)}: trajectory {index} cannot be read"
        # float64 too large for float32 is reported below, as infinite.
        remedy = "the file is damaged or its disk fails, so fetch or write it again"
        with np.errstate(over="ignore", invalid="ignore"), _damage(fault, remedy):
            fields = self._load(index, start, length)
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

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()


class _PDEBench(Source):
    """One dataset per channel in one file, time before space."""

    layout = "pdebench"

    def __init__(self, path: Path, file: h5py.File):
        self.path, self._file, self.datasets = path, file, CHANNELS
        self._channels = [_dataset(path, file, name, (4,)) for name in CHANNELS]
        shapes = {name: channel.shape for name, channel in zip(CHANNELS, self._channels, strict=True)}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise InputError(f"{path}: datasets of unequal shapes: {listed}; the file is incomplete, so write it again")
        self.count, steps, x, y = self._channels[0].shape
        self.shape = (x, y, steps, len(CHANNELS))
        self.itemsize = max(channel.dtype.itemsize for channel in self._channels)

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        fields = np.empty((*self.shape[:2], length, self.shape[3]), np.float32)
        for number, channel in enumerate(self._channels):
            fields[..., number] = np.moveaxis(channel[index, start : start + length], 0, -1)
        return fields


class _Stacked(Source):
    """All trajectories in the dataset `data` of one file."""

    layout = "stacked"

    def __init__(self, path: Path, file: h5py.File):
        self.path, self._file, self.datasets = path, file, ("data",)
        self._data = _dataset(path, file, "data", (5, 4))
        self.count, self.shape = self._data.shape[0], _with_channel(self._data.shape[1:])
        self.itemsize = self._data.dtype.itemsize

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        window = self._data[index, :, :, start : start + length]
        return window.reshape(*self.shape[:2], length, self.shape[3]).astype(np.float32)


class _Scattered(Source):
    """One file per trajectory, opened for each read, since a process may not hold thousands of files open."""

    layout = "scattered"

    def __init__(self, path: Path, count: int):
        self.path, self.count, self.datasets = path, count, ("data",)
        with _contents(path / "data_0.hdf5"), _opened(path / "data_0.hdf5") as file:
            data = _dataset(path / "data_0.hdf5", file, "data", (4, 3))
            self.shape, self.itemsize = _with_channel(data.shape), data.dtype.itemsize

    def file(self, index: int) -> Path:
        return self.path / f"data_{index}.hdf5"

    def check(self, index: int) -> None:
        with _contents(self.file(index)), _opened(self.file(index)) as file:
            self._data(index, file)

    def _data(self, index: int, file: h5py.File) -> h5py.Dataset:
        data = _dataset(self.file(index), file, "data", (4, 3))
        if _with_channel(data.shape) != self.shape:
            raise InputError(
                f"{self.file(index)}, dataset data: shape {short_repr(data.shape)}, but data_0.hdf5 holds "
                f"{self.shape}; keep trajectories of one size in a folder"
            )
        return data

    def _load(self, index: int, start: int, length: int) -> np.ndarray:
        with _opened(self.file(index)) as file:
            window = self._data(index, file)[:, :, start : start + length]
        return window.reshape(*self.shape[:2], length, self.shape[3]).astype(np.float32)


def open_source(path: Path) -> Source:
    """Open trajectories of any layout, without reading their numbers; raise an InputError if they are unusable."""
    if path.is_dir():
        return _Scattered(path, _count_scattered(path))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_contents(path))
        file = stack.enter_context(_opened(path))
        if all(isinstance(file.get(name), h5py.Dataset) for name in CHANNELS):
            source = _PDEBench(path, file)
        elif isinstance(file.get("data"), h5py.Dataset):
            source = _Stacked(path, file)
        else:
            raise InputError(f"{path}: no layout known here; it has {_listing(file)}, and expected are {LAYOUTS}")
        stack.pop_all()  # the source closes the file
        return source


@contextlib.contextmanager
def _damage(fault: str, remedy: str) -> Generator[None]:
    """Turn any error of h5py inside into an InputError: its kind depends on what is damaged."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{fault} ({one_line(error)}); {remedy}") from error


def _contents(path: Path) -> contextlib.AbstractContextManager[None]:
    return _damage(f"{path}: its table of contents is damaged", "fetch or write the file again")


def _count_scattered(folder: Path) -> int:
    """Return the number of files data_0.hdf5, data_1.hdf5, ...; raise an InputError if there are none or gaps."""
    names = [entry.name for entry in folder.iterdir()]
    numbers = {int(match[1]) for name in names if (match := re.fullmatch(r"data_(0|[1-9]\d*)\.hdf5", name))}
    if not numbers:
        there = ", ".join(map(printable, sorted(names)[:_LISTED])) or "nothing"
        raise InputError(
            f"{folder}: holds neither data_0.hdf5, data_1.hdf5, ... nor train and test; it holds {there}. Give the "
            "folder of the trajectories, or an HDF5 file"
        )
    if missing := max(numbers) + 1 - len(numbers):
        first = next(number for number in range(len(numbers) + 1) if number not in numbers)
        raise InputError(
            f"{folder}: data_{first}.hdf5 is missing ({missing} of {max(numbers) + 1} files are); "
            "fetch or write it, or number the files without gaps"
        )
    return len(numbers)


def _opened(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; raise an InputError that says why it cannot be."""
    try:
        path.open("rb").close()  # h5py's own messages bury what the system says
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give an HDF5 file or folder that is there and can be read"
        ) from error
    with _damage(f"{path}: cannot be opened", "if it is truncated or damaged, fetch or write it again"):
        if not h5py.is_hdf5(path):
            raise InputError(f"{path}: not an HDF5 file, or cut off at its start; fetch it again, or give another")
        return h5py.File(path, "r")


def _dataset(path: Path, file: h5py.File, name: str, axes: tuple[int, ...]) -> h5py.Dataset:
    """Return a dataset of floating point numbers with as many axes as one of `axes`, and none of them empty."""
    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        raise InputError(f"{path}: no dataset {name}; it has {_listing(file)}, and expected are {LAYOUTS}")
    where, shape = f"{path}, dataset {name}", data.shape or ()
    if data.dtype.kind != "f":
        raise InputError(
            f"{where}: holds {printable(str(data.dtype))}, not floating point numbers; store it as float32"
        )
    if len(shape) not in axes:
        wanted = " or ".join(map(str, axes))
        raise InputError(
            f"{where}: shape {short_repr(shape)} has {len(shape)} axes, not {wanted}; expected are {LAYOUTS}"
        )
    if 0 in shape:
        raise InputError(f"{where}: shape {shape} is empty; write the file again with at least one entry on each axis")
    _check_storage(where, path, data)
    return data


def _check_storage(where: str, path: Path, data: h5py.Dataset) -> None:
    """Raise an InputError if the file cannot hold a dataset, before memory is taken for the shape in its header."""
    if data.is_virtual or data.external:  # it lies in other files
        return
    end, plan = path.stat().st_size, data.id.get_create_plist()
    filters = {plan.get_filter(number)[0] for number in range(plan.get_nfilters())}
    packed = 1 if not filters else _MOST_PACKED if filters <= _FILTERS else math.inf
    stored, size = data.id.get_storage_size(), math.prod(data.shape) * data.dtype.itemsize
    if stored > end or size > packed * stored + (_SLACK if filters else 0) or not stored:
        raise InputError(
            f"{where}: shape {short_repr(data.shape)} of {printable(str(data.dtype))} needs {size} bytes, which the "
            f"{stored} bytes that are stored in a file of {end} cannot hold; fetch or write the file again"
        )
    if data.chunks is None:
        return
    whole = math.prod(data.chunks) * data.dtype.itemsize

    def is_bad(chunk: Any) -> bool | None:
        can_hold = chunk.size >= _LEAST_PACKED and whole <= packed * chunk.size + _SLACK
        good = can_hold if packed > 1 else chunk.size == whole
        return None if good and chunk.byte_offset + chunk.size <= end else True

    if data.id.chunk_iter(is_bad):  # the HDF5 library does not check
        raise InputError(
            f"{where}: a chunk of shape {short_repr(data.chunks)} is not whole in the file; fetch or write the file "
            "again"
        )


def _with_channel(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the shape of a trajectory stored as (X, Y, T, C), or as (X, Y, T) for one channel."""
    x, y, steps, *channels = shape
    return x, y, steps, channels[0] if channels else 1


def _listing(file: h5py.File) -> str:
    """Return names and shapes at the top of a file, the first dozen, for messages."""
    items = ((name, file.get(name)) for name in islice(file, _LISTED))
    listed = [
        f"{printable(name)} {short_repr(item.shape)}" if isinstance(item, h5py.Dataset) else f"{printable(name)}/"
        for name, item in items
    ]
    return ", ".join(listed) + (", ..." if len(file) > _LISTED else "") if listed else "no datasets"
