"""Images laid out as `split/class/name.jpg`, in a directory or in tar archives.

Archives are read as streams and never extracted. The decoded arrays are kept in a cache file that
is rebuilt when a source file changes or the cache is damaged.
"""

import contextlib
import hashlib
import io
import json
import logging
import lzma
import os
import tarfile
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ._splits import SIZE, DataError, Splits

_SPLITS = ("train", "test", "val")
_IMAGES = (".jpg", ".jpeg", ".png")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_LAYOUT = "split/class/name.jpg with the splits `train` and `test` (or `val`)"
_FORMAT = 1  # of the cache file; raise it when decoding changes
_BATCH = 256  # images decoded by one task
_THREADS = min(4, os.cpu_count() or 1)  # Pillow decodes without the GIL, but these images are tiny

_log = logging.getLogger(__name__)


class _File(NamedTuple):
    """One image that is not decoded yet; `content` is its bytes, or the path that holds them."""

    split: str
    label: str
    name: str
    where: str
    content: bytes | Path


def load_folder(path: Path, cache_dir: Path) -> Splits:
    """Reads a folder data set: a directory of images, a tar archive, or a directory of archives.

    Args:
        path: A directory with `train/class/*.jpg` and `test/class/*.jpg` (or `val`; jpg, jpeg or
            png), a tar archive of such a directory, or a directory of such archives.
        cache_dir: Where the decoded arrays are kept; created if need be.

    Returns:
        The images, sorted by class and file name; classes sorted by name.

    Raises:
        DataError: If the path or the training split is missing, a split is empty, the classes of
            the splits differ, or an image cannot be read.
    """
    path = path.expanduser().resolve()
    if not path.exists():
        raise DataError(f"dataset='folder:{path}': no such file or directory.")
    archives = _archives(path)
    sources = archives or _listing(path)
    cache = cache_dir / f"folder-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.npz"
    key = _key(path, sources)
    splits = _read_cache(cache, key)
    if splits is None:
        files = _stream(archives) if archives else _walk(path, sources)
        splits = _assemble(path, _decode(files, total=None if archives else len(sources)))
        _write_cache(cache, key, splits)
    return splits


def _archives(path: Path) -> list[Path]:
    """Lists the tar archives that `path` stands for.

    Args:
        path: The data set.

    Returns:
        The archives, sorted; empty if `path` is a directory that holds the splits.

    Raises:
        DataError: If it is a directory with neither.
    """
    if path.is_file():
        return [path]
    if any((path / split).is_dir() for split in _SPLITS):
        return []
    found = sorted(entry for entry in path.iterdir() if entry.name.endswith(_TARS) and entry.is_file())
    if not found:
        raise DataError(f"dataset='folder:{path}': must hold {_LAYOUT}, or tar archives ({' '.join(_TARS)}) of that.")
    return found


def _listing(path: Path) -> list[Path]:
    """Lists the image files of a directory of splits.

    Args:
        path: The data set.

    Returns:
        The files, sorted by split, class and name.

    Raises:
        DataError: If the directory of a class holds no image.
    """
    found = []
    for split in _SPLITS:
        for folder in sorted((path / split).glob("[!.]*/")):
            files = [file for file in folder.iterdir() if _is_image(file.name)]
            if not files:
                raise DataError(f"{folder}: must hold images ({' '.join(_IMAGES)}), got none. Add some or delete it.")
            found += sorted(files)
    return found


def _is_image(name: str) -> bool:
    """Returns whether a file name is an image's; ".hidden" and macOS's "._name.jpg" are not."""
    return name.lower().endswith(_IMAGES) and not name.startswith(".")


def _key(path: Path, sources: list[Path]) -> str:
    """Returns a hash of what the cache depends on: names, sizes and times of all source files."""
    stats = [(str(source), (stat := source.stat()).st_size, stat.st_mtime_ns) for source in sources]
    return hashlib.sha256(json.dumps([_FORMAT, SIZE, str(path), stats]).encode()).hexdigest()


def _walk(path: Path, sources: list[Path]) -> Iterator[_File]:
    """Yields the images of a directory."""
    for source in sources:
        split, label, name = source.relative_to(path).parts
        yield _File(split, label, name, str(source), source)


def _stream(archives: list[Path]) -> Iterator[_File]:
    """Yields the images of tar archives, whose paths end in split/class/name.

    Args:
        archives: The archives, any compression.

    Yields:
        Images in the order of the archives.

    Raises:
        DataError: If an archive cannot be read or holds an image as a link.
    """
    for archive in archives:
        try:
            with tarfile.open(archive, "r|*") as tar:
                for member in tar:
                    split, label, name = (("", "", "") + PurePosixPath(member.name).parts)[-3:]
                    if split not in _SPLITS or label.startswith(".") or not _is_image(name) or member.isdir():
                        continue
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is None:
                        raise DataError(f"{archive}: {member.name} must be a plain file, got a link. Pack it anew.")
                    yield _File(split, label, name, f"{archive}: {member.name}", stream.read())
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{archive}: not a readable tar archive ({error}). Copy or pack it again.") from error


def _decode(files: Iterable[_File], total: int | None) -> dict[tuple[str, str, str], np.ndarray]:
    """Decodes images in a thread pool, with a progress bar.

    Args:
        files: The images.
        total: How many there are, if known.

    Returns:
        Arrays, uint8 (32, 32, 3), by split, class and name.

    Raises:
        DataError: If an image cannot be read or occurs twice.
    """
    decoded = {}
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=total, desc="decoding", unit=" images") as bar:
        for batch, arrays in _in_background(pool, files):
            for file, pixels in zip(batch, arrays, strict=True):
                key = (file.split, file.label, file.name)
                if key in decoded:
                    raise DataError(f"{file.where}: {'/'.join(key)} occurs twice. Keep one of the two.")
                decoded[key] = pixels
            bar.update(len(batch))
    return decoded


def _in_background(pool: Executor, files: Iterable[_File]) -> Iterator[tuple[list[_File], list[np.ndarray]]]:
    """Yields batches of files with their pixels, while later ones are decoded and read."""
    files = iter(files)
    running: deque[tuple[list[_File], Future[list[np.ndarray]]]] = deque()
    # One task per batch, not per image: handing over a task costs as much as decoding 32x32 pixels.
    while batch := list(islice(files, _BATCH)):
        running.append((batch, pool.submit(lambda batch: [_pixels(file) for file in batch], batch)))
        if len(running) > 2 * _THREADS:  # bounds the memory
            done, future = running.popleft()
            yield done, future.result()
    for done, future in running:
        yield done, future.result()


def _pixels(file: _File) -> np.ndarray:
    """Decodes one image.

    Args:
        file: The image.

    Returns:
        uint8, shape (32, 32, 3); resized if the image has another size.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file.where}: not a readable image ({error}). Replace or delete it.") from error
    if rgb.size != (SIZE, SIZE):
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _assemble(path: Path, decoded: dict[tuple[str, str, str], np.ndarray]) -> Splits:
    """Sorts decoded images by class and name and checks that the splits belong together.

    Args:
        path: The data set, for errors.
        decoded: Arrays, uint8 (32, 32, 3), by split, class and name.

    Returns:
        The images.

    Raises:
        DataError: If a split is empty or the classes differ.
    """
    keys: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key in sorted(decoded):
        keys[key[0]].append(key)
    test = "test" if keys["test"] or not keys["val"] else "val"
    for split in ("train", test):
        if not keys[split]:
            raise DataError(f"dataset='folder:{path}': the split `{split}` has no images; expected {_LAYOUT}.")
    names, test_names = ({key[1] for key in keys[split]} for split in ("train", test))
    if names != test_names:
        raise DataError(
            f"dataset='folder:{path}': the splits must have the same classes; only in `train`: "
            f"{sorted(names - test_names)}, only in `{test}`: {sorted(test_names - names)}."
        )
    number = {name: i for i, name in enumerate(sorted(names))}
    arrays = []
    for split in ("train", test):
        arrays.append(np.stack([decoded[key] for key in keys[split]]))
        arrays.append(np.asarray([number[key[1]] for key in keys[split]], np.int32))
    return Splits(*arrays, class_names=tuple(number))


def _read_cache(cache: Path, key: str) -> Splits | None:
    """Returns the cached arrays; None if there are none, or they are outdated or damaged."""
    if not cache.exists():
        return None
    try:
        # Opened here, because np.load leaves a file that it cannot read open.
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as saved:  # zip checksums find flipped bits
            if str(saved["key"]) != key:
                return None
            arrays = [saved[field] for field in Splits._fields[:4]]
            return Splits(*arrays, class_names=tuple(saved["class_names"].tolist()))
    except Exception as error:  # damage shows as BadZipFile, zlib.error, ValueError, EOFError, KeyError, ...
        _log.warning("%s: damaged cache (%s); decoding the images again.", cache, error)
        return None


def _write_cache(cache: Path, key: str, splits: Splits) -> None:
    """Writes the arrays in one step; a cache that cannot be written costs time, not the run."""
    partial = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, key=np.asarray(key), **splits._asdict())
        os.replace(partial, cache)
    except OSError as error:
        _log.warning("%s: cannot be written (%s); the next run decodes the images again.", cache, error)
        with contextlib.suppress(OSError):
            partial.unlink()
