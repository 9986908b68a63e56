"""What every data source returns (`Splits`) and the one error it raises (`DataError`)."""

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
        class_names: One name per label, in label order.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
