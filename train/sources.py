"""What the sources of data share: `Images`, which all of them return, the error they raise, and reading archives."""

import contextlib
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from farms_jax.errors import InputError

SIZE = 32  # height and width in pixels of every image handed to the models


class DataError(InputError):
    """A data set is missing, damaged or not laid out as documented; the text says what to do."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory, in a fixed order.

    Attributes:
        name: exact name of the data, written into every output.
        train_images: uint8, shape (N, 32, 32, 3), values 0 to 255, RGB.
        train_labels: int32, shape (N,), values in [0, num_classes).
        test_images: uint8, shape (M, 32, 32, 3).
        test_labels: int32, shape (M,).
        class_names: one name per label, in label order.
        published: mean and standard deviation per channel to use instead of those of the training images.
        notice: what to tell the user loudly: that these are other data than the default.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    published: tuple[tuple[float, ...] | np.ndarray, tuple[float, ...] | np.ndarray] | None = None
    notice: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel, each float32 (3,), in [0, 1] units; deviations are positive."""
        if self.published is not None:
            mean, std = self.published
            return np.asarray(mean, np.float32), np.asarray(std, np.float32)
        # Exact sums over the 256 possible values: no float copy of the images, no rounding.
        counts = np.stack([np.bincount(self.train_images[..., c].ravel(), minlength=256) for c in range(3)])
        share, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ levels
        std = np.sqrt(np.sum(share * (levels - mean[:, None]) ** 2, axis=1))
        # Constant images have deviation 0, by which nobody can divide: one grey level instead.
        return mean.astype(np.float32), np.maximum(std, 1 / 255).astype(np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shapes, images and labels of both splits, in hexadecimal."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{little.dtype.str}{little.shape}".encode())
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()


@contextlib.contextmanager
def open_tar(archive: Path, remedy: str) -> Generator[tarfile.TarFile]:
    """Open a tar archive of any compression as a stream, never extracted to disk; a DataError ends with the remedy."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{archive}: not a readable tar archive ({error}). {remedy}") from error
