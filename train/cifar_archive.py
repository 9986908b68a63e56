"""CIFAR-10 and CIFAR-100 from the original binary archive, TensorFlow Datasets, or a download.

The sources are tried in that order. All three give the same images in the same order, so the fingerprint of the data
does not tell which one was used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import requests
from filelock import FileLock

from .sources import SIZE, DataError, Images, open_tar

TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte
RETRIES = 2
_PIXELS = 3 * SIZE * SIZE  # bytes of one image in a record, channel-major

_Split = tuple[np.ndarray, np.ndarray]  # images, uint8 (N, 32, 32, 3), and labels, int32 (N,)
_Splits = tuple[_Split, _Split]  # training, test

# CIFAR-100's fine labels, in label order.
_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Source:
    """Where one CIFAR data set is found and how it is laid out."""

    url: str  # of the binary archive
    md5: str  # as published at https://www.cs.toronto.edu/~kriz/cifar.html
    folder: str  # inside the archive
    pickled: tuple[str, ...]  # names of the Python version; never read: unpickling a file runs the code it holds
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_bytes: int  # bytes before the pixels of a record; the last one is the label
    class_names: tuple[str, ...]
    # Mean and standard deviation per channel that are in common use. The CIFAR-10 deviations are means of per-image
    # deviations (those of the pixels are 0.247, 0.243, 0.262), kept for comparability with published runs.
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    num_train: int = 50_000  # records in all training files
    num_test: int = 10_000

    @property
    def archive(self) -> str:
        """File name of the binary archive."""
        return self.url.rsplit("/", 1)[-1]


SOURCES = {
    "cifar10": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        pickled=("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        label_bytes=1,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        statistics=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "cifar100": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        pickled=("cifar-100-python.tar.gz", "cifar-100-python"),
        train_files=("train.bin",),
        test_files=("test.bin",),
        label_bytes=2,  # coarse, then fine
        class_names=tuple(_FINE.split()),
        statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
}


class Unavailable(DataError):
    """No source has the data set."""

    def __init__(self, name: str, reasons: str, remedy: str):
        """Say what was tried (`reasons`), and what to do (`remedy`)."""
        super().__init__(
            f"dataset={name!r} is neither on this machine nor could it be downloaded.\n{reasons}\n{remedy}\n"
            "`--dataset digits` works offline."
        )
        self.reasons, self.remedy = reasons, remedy


def load_cifar(name: str, data_dir: Path) -> Images:
    """Return a data set from the first source that has it; a download goes into `data_dir`.

    Raises:
        Unavailable: no source has it. A damaged file in `data_dir` is a plain `DataError`: it is not passed over.
    """
    source, reasons = SOURCES[name], []
    splits = _read_local(source, data_dir, reasons) or _read_tfds(name, reasons)
    if splits is None:
        try:
            archive = _download(source, data_dir)
        except (OSError, ValueError, NotImplementedError) as error:  # pooch's checksum error is a ValueError
            kind = "" if isinstance(error, _FinalError) else f"{type(error).__name__}: "
            reasons.append(f"- Download of {source.url} failed: {kind}{error}.")
            remedy = f"Fetch {source.url} by hand and put it into {data_dir} (as {data_dir / source.archive})."
            raise Unavailable(name, "\n".join(reasons), remedy) from error
        splits = _read_archive(source, archive)
    train, test = splits
    return Images(name, *train, *test, class_names=source.class_names, published=source.statistics)


def _read_local(source: Source, data_dir: Path, reasons: list[str]) -> _Splits | None:
    """Read the archive or the extracted files; `None` if there is neither, with the reason added."""
    archive = data_dir / source.archive
    if archive.is_file():
        md5 = pooch.file_hash(str(archive), alg="md5")
        if md5 != source.md5:
            raise DataError(
                f"{archive}: the md5 checksum must be {source.md5}, got {md5}: the file is damaged, incomplete or "
                f"another version. Delete it to have it downloaded again, or fetch {source.url}."
            )
        return _read_archive(source, archive)
    names = source.train_files + source.test_files
    for folder in (data_dir / source.folder, data_dir):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return _decode(source, {name: (folder / name).read_bytes() for name in names}, folder)
        if folder.name == source.folder and folder.is_dir():
            raise DataError(
                f"{folder}: missing {', '.join(missing)}. Extract {source.archive} again, or delete the directory."
            )
    if pickled := [data_dir / entry for entry in source.pickled if (data_dir / entry).exists()]:
        reasons.append(
            f"- {pickled[0]} is the pickled Python version, which is never read (unpickling runs the code in the "
            f"file); the binary version {source.archive} is not there."
        )
    else:
        reasons.append(f"- {data_dir} holds neither {source.archive} nor its extracted directory {source.folder}.")
    return None


def _read_archive(source: Source, archive: Path) -> _Splits:
    wanted = {*source.train_files, *source.test_files}
    files = {}
    with open_tar(archive, f"Fetch {source.url} again.") as tar:
        for member in tar:
            name = Path(member.name).name
            stream = tar.extractfile(member) if name in wanted else None
            if stream is not None:
                files[name] = stream.read()
    if missing := sorted(wanted - files.keys()):
        raise DataError(f"{archive}: missing {', '.join(missing)}. Fetch {source.url} again.")
    return _decode(source, files, archive)


def _decode(source: Source, files: dict[str, bytes], where: Path) -> _Splits:
    """Decode record files, given as bytes by name; `where` is named in errors."""

    def decode(names: tuple[str, ...], total: int) -> _Split:
        parts = [_records(source, files[name], total // len(names), f"{where}: {name}") for name in names]
        images, labels = zip(*parts, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    return decode(source.train_files, source.num_train), decode(source.test_files, source.num_test)


def _records(source: Source, content: bytes, count: int, where: str) -> _Split:
    """Decode one file of `count` records: label bytes, then 3072 bytes red, green, blue, row by row."""
    length = source.label_bytes + _PIXELS
    if len(content) != count * length:
        raise DataError(
            f"{where}: must hold {count} records of {length} bytes = {count * length} bytes, got {len(content)}: the "
            f"file is truncated or another data set. Extract {source.archive} again."
        )
    records = np.frombuffer(content, np.uint8).reshape(count, length)
    labels = records[:, source.label_bytes - 1].astype(np.int32)
    if labels.max(initial=0) >= len(source.class_names):
        raise DataError(
            f"{where}: labels must be below {len(source.class_names)}, got {labels.max()}: the file is damaged. "
            f"Extract {source.archive} again."
        )
    pixels = records[:, source.label_bytes :].reshape(count, 3, SIZE, SIZE)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


def _read_tfds(name: str, reasons: list[str]) -> _Splits | None:
    """Read a data set that TensorFlow Datasets has prepared; `None` if it cannot be read, with the reason added."""
    # Nothing is prepared here: that needs TensorFlow, and would fetch the archive that the next source fetches anyway.
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        reasons.append(f"- TensorFlow Datasets: not importable ({error}); `pip install 'farms-jax[tfds]'`.")
        return None
    try:
        train, test = (tfds.data_source(name, split=split, download=False) for split in ("train", "test"))
        return _tfds_split(train), _tfds_split(test)
    except Exception as error:  # an unprepared data set is a KeyError, a TFRecord one NotImplementedError, ...
        prepare = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        reasons.append(f"- TensorFlow Datasets: not prepared as array_record ({error}); with TensorFlow: `{prepare}`.")
        return None


def _tfds_split(examples: Any) -> _Split:
    """Put the examples of a TFDS source in the order of the archive, by ids like "train_00042"."""
    ordered = sorted(examples, key=lambda example: example["id"])
    images = np.stack([np.asarray(example["image"], np.uint8) for example in ordered])
    return images, np.asarray([example["label"] for example in ordered], np.int32)


class _FinalError(OSError):
    """A download failed in a way that another try would not change; the text says all."""


def _download(source: Source, directory: Path) -> Path:
    """Return the path of the archive, downloaded if need be; pooch checks it, retries, and names only a whole file."""
    name = source.archive
    directory.mkdir(parents=True, exist_ok=True)
    remote = pooch.create(
        directory, base_url="", registry={name: f"md5:{source.md5}"}, urls={name: source.url}, retry_if_failed=RETRIES
    )
    with FileLock(directory / f"{name}.lock"):  # runs that are started together download once
        # pooch passes these arguments by position, but its type hint names them otherwise.
        return Path(remote.fetch(name, downloader=_fetch))  # pyright: ignore[reportArgumentType]


def _fetch(url: str, output_file: Any, pooch_of_file: Any) -> None:
    """Download as pooch does, but give up at once on an offline machine or a missing file."""
    # "identity": a server that labels a .tar.gz as gzip-encoded would have it unpacked on the way.
    headers = {"Accept-Encoding": "identity"}
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT, headers=headers)
    try:
        fetch(url, output_file, pooch_of_file)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _FinalError(f"no connection ({error})") from error
    except requests.HTTPError as error:
        answer = error.response
        if answer is None or answer.status_code >= 500:
            raise
        raise _FinalError(f"the server answered {answer.status_code} {answer.reason}") from error
