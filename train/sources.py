"""What the sources of data share: `Splits`, which all of them return, the error they raise, and reading archives."""

import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from farms_jax.errors import InputError

SIZE = 32  # height and width in pixels of every image handed to the models


class DataError(InputError):
    """A data set is missing, damaged or not laid out as documented; the text says what to do."""


class Splits(NamedTuple):
    """Training and test images of one data set in a fixed order.

    Attributes:
        train_images: uint8, shape (N, 32, 32, 3), values 0 to 255, RGB.
        train_labels: int32, shape (N,), values in [0, len(class_names)).
        test_images: uint8, shape (M, 32, 32, 3).
        test_labels: int32, shape (M,).
        class_names: one name per label, in label order.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


@contextlib.contextmanager
def open_tar(archive: Path, remedy: str) -> Generator[tarfile.TarFile]:
    """Open a tar archive of any compression as a stream; it is never extracted to disk.

    Args:
        archive: path of the archive.
        remedy: what to do where it is damaged.

    Yields:
        The archive.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{archive}: not a readable tar archive ({error}). {remedy}") from error
