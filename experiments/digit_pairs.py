"""A data set of 100 classes that comes with scikit-learn: two of its digits side by side, labelled 00 to 99.

It stands in for CIFAR-100 where that cannot be had: the final layer has the paper's 100 outputs, but the task is far
easier.
"""

import numpy as np

from train.data import Images, load


def digit_pairs(train: int, test: int, seed: int) -> Images:
    """Draw pairs of digits, those of the training and of the test split apart.

    Args:
        train: training images, of which every class has a hundredth, rounded.
        test: test images, likewise.
        seed: of the draw.

    Returns:
        Images of 32 x 32, each digit squeezed to half its width.
    """
    digits = load("digits")
    generator = np.random.default_rng(seed)
    train_images, train_labels = _pairs(digits.train_images, digits.train_labels, train, generator)
    test_images, test_labels = _pairs(digits.test_images, digits.test_labels, test, generator)
    names = tuple(f"{label:02d}" for label in range(100))
    name = "digit pairs (scikit-learn, 32x32 RGB, 100 classes)"
    return Images(name, train_images, train_labels, test_images, test_labels, names, digits.mean, digits.std)


def _pairs(
    images: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    wanted = np.arange(count, dtype=np.int32) * 100 // count
    drawn = []
    for digits in (wanted // 10, wanted % 10):
        members = [np.flatnonzero(labels == digit) for digit in range(10)]
        drawn.append(images[[generator.choice(members[digit]) for digit in digits]][:, :, ::2])
    return np.concatenate(drawn, axis=2), wanted
