"""Image data sets in memory: CIFAR-100, CIFAR-10, scikit-learn's digits, or a folder of images.

>>> from train.data import load
>>> images = load("digits", limit_train=100)
>>> images.train_images.shape, images.num_classes
((100, 32, 32, 3), 10)
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pooch
from PIL import Image

from .cifar_archive import Unavailable, load_cifar
from .image_folder import load_folder
from .sources import SIZE, DataError, Images

__all__ = ["DataError", "Images", "load"]

_DIGITS = "digits (scikit-learn, 32x32 RGB)"


def load(dataset: str, *, data_dir: Path | None = None, limit_train: int | None = None) -> Images:
    """Return a data set by name; a named one is never replaced by another.

    Args:
        dataset: "cifar100" or "cifar10": from the binary archive in `data_dir`, from TensorFlow Datasets if prepared
            there, else downloaded into `data_dir`. "digits": the 1,797 images that come with scikit-learn.
            "folder:PATH": images as split/class/name.jpg in a directory, a tar archive, or a directory of archives.
            "auto": cifar100 if it can be had, else digits with a notice.
        data_dir: Directory of the archives, of downloads and of decoded images; the user's cache directory if None.
        limit_train: Number of training images to keep, spread evenly over the classes; all if None.

    Raises:
        DataError: the data set cannot be had, is damaged, or has fewer than `limit_train` training images, or an
            argument is none of the documented values.
    """
    folder = dataset.startswith("folder:") and dataset != "folder:"
    if not folder and dataset not in {"auto", "cifar100", "cifar10", "digits"}:
        raise DataError(f"dataset must be one of auto, cifar100, cifar10, digits, folder:PATH, got {dataset!r}.")
    if limit_train is not None and (type(limit_train) is not int or limit_train < 1):
        raise DataError(f"limit_train must be None or an integer >= 1, got {limit_train!r}.")
    directory = Path(pooch.os_cache("farms_jax") if data_dir is None else data_dir).expanduser()
    if directory.exists() and not directory.is_dir():
        raise DataError(f"data_dir must be a directory, got the file {directory}.")
    if dataset == "auto":
        images = _auto(directory)
    elif dataset == "digits":
        images = _digits()
    elif folder:
        images = load_folder(dataset, directory)
    else:
        images = load_cifar(dataset, directory)
    return images if limit_train is None else _limit(images, limit_train)


def _auto(directory: Path) -> Images:
    """Return CIFAR-100 if it can be had, else digits with a notice that says so."""
    try:
        return load_cifar("cifar100", directory)
    except Unavailable as error:
        notice = (
            f"NOTICE: CIFAR-100 IS NOT AVAILABLE; TRAINING ON {_DIGITS} INSTEAD: 1,797 handwritten digits in 10 "
            f"classes. Its accuracies say nothing about CIFAR-100.\n{error.reasons}\n"
            f"For CIFAR-100: {error.remedy} Use `--dataset digits` to silence this notice."
        )
        return replace(_digits(), notice=notice)


def _digits() -> Images:
    """Return scikit-learn's digits, 8x8 grey levels, enlarged to 32x32 RGB: 1,442 training and 355 test images.

    Every fifth image of a class goes to the test split: stratified, 80/20, and no random numbers, whose streams may
    change between numpy versions.
    """
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it

    levels, target = load_digits(return_X_y=True)  # float64 (1797, 64), 0 to 16
    grey = np.rint(np.asarray(levels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in grey]
    images = np.repeat(np.stack([np.asarray(image) for image in enlarged])[..., None], 3, axis=-1)
    labels = np.asarray(target, np.int32)
    test = _rank_in_class(labels) % 5 == 4
    return Images(_DIGITS, images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Number the labels of each class from 0; [3, 5, 3, 3, 5] -> [0, 0, 1, 2, 1]."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        rank[where] = np.arange(len(where))
    return rank


def _limit(images: Images, count: int) -> Images:
    """Keep the first training images of each class, since folders are sorted by class; their order stays."""
    labels = images.train_labels
    if count > len(labels):
        raise DataError(f"limit_train must be at most {len(labels)} for this data set, got {count}.")
    keep = np.sort(np.lexsort((labels, _rank_in_class(labels)))[:count])
    return replace(images, train_images=images.train_images[keep], train_labels=labels[keep])
