"""Training and test trajectories: which ones are used, on which grid, and whether they are usable.

Nothing is held in memory: `Fields.read` fetches one window of one trajectory.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import expanded

from .hdf5 import Source, open_source

SCAN_BYTES = 2 * 2**30  # data up to this size are read whole at opening: seconds, and no run ends in a bad trajectory
SAMPLED = 8  # trajectories read at opening of larger data
_BAR_AFTER = 2.0  # seconds: small data need no progress bar


class Fields:
    """One split of the data, trajectories (X, Y, T, C) that are read from disk when asked for."""

    def __init__(self, name: str, source: Source, indices: Sequence[int], resolution: int | None = None):
        """Take some trajectories of a source, on their own grid or on one of (resolution, resolution)."""
        x, y, self.steps, self.channels = source.shape  # as stored
        self.name, self.source, self.indices = name, source, tuple(indices)
        self.size = (x, y) if resolution is None else (resolution, resolution)  # as read

    def __len__(self) -> int:
        """Return the number of trajectories."""
        return len(self.indices)

    def read(self, i: int, start: int, length: int) -> np.ndarray:
        """Return a window of time, (X, Y, length, C), of trajectory `i` of the split; for errors see `Source.read`."""
        fields = self.source.read(self.indices[i], start, length)
        for axis, size in enumerate(self.size):
            if size != fields.shape[axis]:
                fields = _resample(fields, axis, size)
        return fields

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self.source.close()


class FieldData(NamedTuple):
    """Both splits of one data set.

    The fingerprint is a SHA-256 over layout, shapes, which trajectories each split has, and the content of those read
    at opening. Neither the place of the files nor the grid they are resampled to enters.
    """

    train: Fields
    test: Fields
    fingerprint: str
    name: str  # of the training file or folder
    notes: tuple[str, ...]  # for the user: the split, subsampling, resampling, checks left for later


def open_fields(
    path: Path,
    *,
    resolution: int | None,
    steps_needed: int,
    test: Path | None = None,
    ratio: float = 1.0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    channels: int = 4,
) -> FieldData:
    """Open training and test trajectories and check them; see `sciml.hdf5` for the layouts.

    A folder with train/ and test/ (or train.hdf5 and test.hdf5) gives both splits. Otherwise, without `test`, the first
    9/10 of the trajectories train and the rest test, as DPOT's preprocessing splits PDEBench's files. Of the training
    trajectories the fraction `ratio` is used, spaced evenly: number i is floor(i / ratio), for a ratio of 1/k every
    k-th, as PDEBench's `reduced_batch`. The limits take the first ones of what is left.

    Fields of another grid than (resolution, resolution) are interpolated bilinearly, as DPOT does: half-pixel centres,
    no antialiasing. Data of at most 2 GiB are read whole to find faults, of larger data 8 trajectories.

    Returns:
        The data, open; close both splits when done.

    Raises:
        InputError: `ratio` is not in (0, 1], or the data are missing, damaged, too short or of other `channels`.
    """
    # As the fraction that was meant: the binary number 0.1 is not quite 1/10.
    share = Fraction(ratio).limit_denominator(1_000_000) if 0 < ratio <= 1 else Fraction(0)
    if share == 0:
        raise InputError(f"ratio must be in (0, 1], got {ratio}; 0.05 uses every twentieth training trajectory")
    path = expanded(path)
    train_path, test_path = _paths(path, test and expanded(test))
    with contextlib.ExitStack() as opened:
        train_source = opened.enter_context(contextlib.closing(open_source(train_path)))
        test_source = opened.enter_context(contextlib.closing(open_source(test_path or train_path)))
        train_count, tested, notes = _split(train_source, test_source if test_path else None)
        trained = [i // share for i in range(math.ceil(train_count * share))]
        name = path.resolve().name
        train = Fields(f"{name} (train)", train_source, trained[:limit_train], resolution)
        held_out = Fields(f"{name} (test)", test_source, tested[:limit_test], resolution)
        for fields in (train, held_out):
            _check_shape(fields, steps_needed, channels)
        if train.size != held_out.size:
            raise InputError(
                f"{train_path} has a grid of {train.size}, {test_path} of {held_out.size}; set a resolution for both"
            )
        fingerprint, scan_notes = _scan(train, held_out)
        opened.pop_all()  # the splits stay open
    notes += [*_use_notes(train, held_out, train_count, share), *scan_notes]
    return FieldData(train, held_out, fingerprint, name, tuple(notes))


def _paths(path: Path, test: Path | None) -> tuple[Path, Path | None]:
    """Return the paths of the training and, if they are separate, the test data."""

    def part(folder: Path, split: str) -> Path | None:
        return next((part for part in (folder / split, folder / f"{split}.hdf5") if part.exists()), None)

    train_part, test_part = part(path, "train"), part(path, "test")
    train = train_part or path
    if test is not None:
        test = part(test, "test") or test
        if test.exists() and train.exists() and test.samefile(train):
            raise InputError(f"{test}: given for training and for testing; leave `test` out to split it 9 to 1")
        return train, test
    if (train_part is None) != (test_part is None):
        found, missing = ("train", "test") if train_part else ("test", "train")
        raise InputError(
            f"{path}: has {found} but no {missing}; add {missing}/ or {missing}.hdf5, or give files one by one"
        )
    return train, test_part


def _split(train: Source, test: Source | None) -> tuple[int, range, list[str]]:
    """Return the number of training trajectories, which ones test, and a note if they share a file."""
    if test is not None:
        return train.count, range(test.count), []
    if train.count < 2:
        raise InputError(
            f"{train.path}: one trajectory cannot both train and test; give test data, or more trajectories"
        )
    cut = train.count * 9 // 10
    note = f"No test data given: of {train.count} trajectories the first {cut} train and the others test."
    return cut, range(cut, train.count), [note]


def _use_notes(train: Fields, test: Fields, train_count: int, share: Fraction) -> list[str]:
    """Return notes on trajectories left out and on resampling."""
    notes = []
    if len(train) < train_count:
        rule = f", every {float(1 / share):g}-th" if share < 1 else ""
        notes.append(f"{len(train)} of {train_count} training trajectories are used{rule}.")
    for fields in (train, test):
        stored, read = ("{}x{}".format(*size) for size in (fields.source.shape[:2], fields.size))
        if stored != read:
            notes.append(f"{fields.name}: fields of {stored} are resampled to {read}, bilinearly.")
    return notes


def _check_shape(fields: Fields, steps_needed: int, channels: int) -> None:
    """Raise an InputError if a split lacks the channels or time steps that the model needs."""
    source = fields.source
    where = f"{source.path}, dataset {', '.join(source.datasets)}"
    x, y, steps, stored = source.shape
    if stored != channels:
        raise InputError(
            f"{where}: {stored} channels in trajectories of (x, y, time, channel) = {(x, y, steps, stored)}, but the "
            f"model takes {channels}; give data or a model with as many"
        )
    if steps < steps_needed:
        raise InputError(
            f"{where}: {steps} time steps, but {steps_needed} are needed (inputs and targets); give longer "
            "trajectories or ask for fewer steps"
        )


def _scan(train: Fields, test: Fields) -> tuple[str, list[str]]:
    """Read all trajectories in use, or a sample of many; return their fingerprint and notes."""
    used = [(fields.source, index) for fields in (train, test) for index in fields.indices]
    total = sum(math.prod(source.shape) * source.itemsize for source, _ in used)  # bytes, uncompressed
    sampled = range(len(used)) if total <= SCAN_BYTES else np.linspace(0, len(used) - 1, SAMPLED).round().astype(int)
    chosen = set(sampled)
    described = [(f.source.layout, f.source.shape, f.source.itemsize, f.indices) for f in (train, test)]
    digest = hashlib.sha256(json.dumps(described).encode())
    bar = tqdm(used, desc="Checking the fields", unit="trajectory", delay=_BAR_AFTER, leave=False, dynamic_ncols=True)
    for number, (source, index) in enumerate(bar):
        if number in chosen:
            digest.update(source.read(index, 0, source.shape[2]).astype("<f4", copy=False).tobytes())
        else:
            source.check(index)
    if len(chosen) == len(used):
        return digest.hexdigest(), []
    note = (
        f"The data take {total / 2**30:.1f} GiB: {len(chosen)} of {len(used)} trajectories were checked for NaN at "
        "opening, the others are when they are read."
    )
    return digest.hexdigest(), [note]


def _resample(fields: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolate linearly along an axis between the centres of its cells; beyond the ends the edge value holds."""
    # As torch.nn.functional.interpolate(mode="bilinear", align_corners=False), which DPOT resamples with.
    old = fields.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    lower = position.astype(np.intp)
    # Two neighbours per point rather than a matrix product, whose matrix is nearly all zeros.
    weight = np.expand_dims((position - lower).astype(np.float32), tuple(range(1, fields.ndim - axis)))
    return fields.take(lower, axis) * (1 - weight) + fields.take(np.minimum(lower + 1, old - 1), axis) * weight
