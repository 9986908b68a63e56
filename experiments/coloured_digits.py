"""A data set of 100 classes that comes with scikit-learn: its digits in ten colours, labelled 10 x digit + colour.

It stands in for CIFAR-100 where that cannot be had: the final layer has the paper's 100 outputs, but the task is far
easier.
"""

import colorsys

import numpy as np

from train.data import Images, load

COLOURS = np.array([colorsys.hsv_to_rgb(hue / 10, 1, 1) for hue in range(10)])


def coloured_digits(train: int, test: int, seed: int) -> Images:
    """Draw digits and colour them, those of the training and of the test split apart.

    Args:
        train: training images, of which every class has a hundredth, rounded.
        test: test images, likewise.
        seed: of the draw.

    Returns:
        Images of 32 x 32.
    """
    digits = load("digits")
    generator = np.random.default_rng(seed)
    train_images, train_labels = _coloured(digits.train_images, digits.train_labels, train, generator)
    test_images, test_labels = _coloured(digits.test_images, digits.test_labels, test, generator)
    names = tuple(f"{digit} in colour {colour}" for digit in range(10) for colour in range(10))
    name = "coloured digits (scikit-learn, 32x32 RGB, 100 classes)"
    return Images(name, train_images, train_labels, test_images, test_labels, names, published=digits.mean_and_std)


def _coloured(
    images: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    wanted = np.arange(count, dtype=np.int32) * 100 // count
    members = [np.flatnonzero(labels == digit) for digit in range(10)]
    drawn = images[[generator.choice(members[label // 10]) for label in wanted]]
    return np.rint(drawn * COLOURS[wanted % 10][:, None, None]).astype(np.uint8), wanted
