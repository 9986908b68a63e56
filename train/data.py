"""Image data sets in memory: CIFAR-100, CIFAR-10, scikit-learn's digits, or a folder of images.

>>> from train.data import load
>>> images = load("digits", limit_train=100)
>>> images.train_images.shape, images.num_classes
((100, 32, 32, 3), 10)
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pooch
from PIL import Image

from .cifar_archive import Unavailable, load_cifar
from .image_folder import load_folder
from .sources import SIZE, DataError, Splits

__all__ = ["CHOICES", "DataError", "Images", "load"]

CHOICES = ("auto", "cifar100", "cifar10", "digits", "folder:PATH")
_DIGITS = "digits (scikit-learn, 32x32 RGB)"
# Mean and standard deviation per channel over the training images, in [0, 1] units. They are the
# numbers in common use; the CIFAR-10 deviations are means of per-image deviations (those of the
# pixels are 0.247, 0.243, 0.262), kept for comparability with published runs.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory.

    Attributes:
        name: Exact name of the data, to be written into every output.
        train_images: uint8, shape (N, 32, 32, 3), values 0 to 255, RGB.
        train_labels: int32, shape (N,), values in [0, num_classes).
        test_images: uint8, shape (M, 32, 32, 3).
        test_labels: int32, shape (M,).
        class_names: One name per label, in label order.
        mean: float32, shape (3,), per channel, in [0, 1] units.
        std: float32, shape (3,), per channel, in [0, 1] units, positive.
        notice: What the user must be told loudly, if anything: other data than the default.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    notice: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shapes, images and labels of both splits, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{little.dtype.str}{little.shape}".encode())
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()


def load(dataset: str, *, data_dir: Path | None = None, limit_train: int | None = None) -> Images:
    """Load a data set by name. A named data set is never replaced by another one.

    Args:
        dataset: "cifar100" or "cifar10": from the binary archive in `data_dir`, from TensorFlow
            Datasets if prepared there, else downloaded into `data_dir`. "digits": the 1,797
            images that come with scikit-learn. "folder:PATH": images as split/class/name.jpg in a
            directory, a tar archive, or a directory of archives. "auto": cifar100 if it can be
            had, else digits with a notice.
        data_dir: Directory of the archives, of downloads and of decoded images; the user's cache
            directory if None.
        limit_train: Number of training images to keep, spread evenly over the classes; all if None.

    Returns:
        The data set.

    Raises:
        DataError: If the data set cannot be had, is damaged, or has fewer than `limit_train`
            training images, or an argument is not one of the documented values.
    """
    if dataset not in CHOICES[:-1] and not (dataset.startswith("folder:") and dataset != "folder:"):
        raise DataError(f"dataset must be one of {', '.join(CHOICES)}, got {dataset!r}.")
    if limit_train is not None and (type(limit_train) is not int or limit_train < 1):
        raise DataError(f"limit_train must be None or an integer >= 1, got {limit_train!r}.")
    directory = Path(pooch.os_cache("farms_jax") if data_dir is None else data_dir).expanduser()
    if directory.exists() and not directory.is_dir():
        raise DataError(f"data_dir must be a directory, got the file {directory}.")
    name, notice = dataset, None
    if dataset == "auto":
        name, splits, notice = _auto(directory)
    elif dataset == "digits":
        name, splits = _DIGITS, _digits()
    elif dataset.startswith("folder:"):
        splits = load_folder(Path(dataset.removeprefix("folder:")), directory)
    else:
        splits = load_cifar(dataset, directory)
    if limit_train is not None:
        splits = _limit(splits, limit_train)
    mean, std = _statistics(name, splits.train_images)
    return Images(name, *splits, mean=mean, std=std, notice=notice)


def _auto(directory: Path) -> tuple[str, Splits, str | None]:
    """Return CIFAR-100 if it can be had, else digits and a notice that says so."""
    try:
        return "cifar100", load_cifar("cifar100", directory), None
    except Unavailable as error:
        notice = (
            f"NOTICE: CIFAR-100 IS NOT AVAILABLE; TRAINING ON {_DIGITS} INSTEAD: 1,797 handwritten digits in 10 "
            f"classes. Its accuracies say nothing about CIFAR-100.\n{error.reasons}\n"
            f"For CIFAR-100: {error.remedy} Use `--dataset digits` to silence this notice."
        )
    return _DIGITS, _digits(), notice


def _digits() -> Splits:
    """Read scikit-learn's digits: 8x8 grey levels, enlarged to 32x32 RGB.

    Every fifth image of a class goes to the test split: stratified, 80/20, and no random numbers,
    whose streams may change between numpy versions.

    Returns:
        1,442 training and 355 test images.
    """
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it

    levels, target = load_digits(return_X_y=True)  # float64 (1797, 64), 0 to 16
    grey = np.rint(np.asarray(levels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in grey]
    images = np.repeat(np.stack([np.asarray(image) for image in enlarged])[..., None], 3, axis=-1)
    labels = np.asarray(target, np.int32)
    test = _rank_in_class(labels) % 5 == 4
    return Splits(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Return for each label how many equal ones stand before it; [3, 5, 3, 3, 5] -> [0, 0, 1, 2, 1]."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        rank[where] = np.arange(len(where))
    return rank


def _limit(splits: Splits, count: int) -> Splits:
    """Keep the first training images of each class, since folders are sorted by class.

    Args:
        splits: The data set.
        count: Number of training images to keep.

    Returns:
        The data set with `count` training images, in their former order.

    Raises:
        DataError: If there are fewer.
    """
    if count > len(splits.train_labels):
        raise DataError(f"limit_train must be at most {len(splits.train_labels)} for this data set, got {count}.")
    by_rank = np.lexsort((splits.train_labels, _rank_in_class(splits.train_labels)))
    keep = np.sort(by_rank[:count])
    return splits._replace(train_images=splits.train_images[keep], train_labels=splits.train_labels[keep])


def _statistics(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation per channel in [0, 1] units, float32 (3,): published or computed."""
    if name in _STATISTICS:
        mean, std = _STATISTICS[name]
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)
    # Exact sums over the 256 possible values: no float copy of the images, no rounding.
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    share, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt(np.sum(share * (levels - mean[:, None]) ** 2, axis=1))
    # Constant images have deviation 0, by which nobody can divide: one grey level instead.
    return mean.astype(np.float32), np.maximum(std, 1 / 255).astype(np.float32)
