"""Images laid out as `split/class/name.jpg`, in a directory or in tar archives.

The decoded arrays are kept in a cache file, which is rebuilt when name, size or time of a source file changes, or when
it is damaged.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from farms_jax.programs.files import atomic, expanded

from .sources import SIZE, DataError, Images, open_tar

_SPLITS = ("train", "test", "val")
_IMAGES = (".jpg", ".jpeg", ".png")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_LAYOUT = "split/class/name.jpg with the splits `train` and `test` (or `val`)"
_FORMAT = 1  # of the cache file; raise it when decoding changes
_CACHED = ("train_images", "train_labels", "test_images", "test_labels", "class_names")

_log = logging.getLogger(__name__)


class _File(NamedTuple):
    """One image that is not decoded yet."""

    split: str
    label: str
    name: str
    where: str  # for errors
    content: io.BytesIO | Path


def load_folder(name: str, cache_dir: Path) -> Images:
    """Return the images of "folder:PATH", sorted by class and file name.

    PATH is a directory with `train/class/*.jpg` and `test/class/*.jpg` (or `val`; jpg, jpeg or png), a tar archive of
    such a directory, or a directory of such archives.

    Raises:
        DataError: the path or a split is missing, the splits have other classes, or an image cannot be read.
    """
    path = expanded(name.removeprefix("folder:")).resolve()
    if not path.exists():
        raise DataError(f"dataset='folder:{path}': no such file or directory.")
    archives = _find_archives(path)
    sources = archives or _find_images(path)
    cache = cache_dir / f"folder-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.npz"
    stats = [(str(source), (stat := source.stat()).st_size, stat.st_mtime_ns) for source in sources]
    key = hashlib.sha256(json.dumps([_FORMAT, SIZE, str(path), stats]).encode()).hexdigest()
    images = _read_cache(cache, key, name)
    if images is None:
        in_folder = (_File(source.parts[-3], source.parts[-2], source.name, str(source), source) for source in sources)
        files = _read_archives(archives) if archives else in_folder
        images = _assemble(name, path, _decode(files, total=None if archives else len(sources)))
        _write_cache(cache, key, images)
    return images


def _find_archives(path: Path) -> list[Path]:
    """Return the tar archives that `path` stands for, sorted; none if it is a directory that holds the splits."""
    if path.is_file():
        return [path]
    if any((path / split).is_dir() for split in _SPLITS):
        return []
    found = sorted(entry for entry in path.iterdir() if entry.name.endswith(_TARS) and entry.is_file())
    if not found:
        raise DataError(f"dataset='folder:{path}': must hold {_LAYOUT}, or tar archives ({' '.join(_TARS)}) of that.")
    return found


def _find_images(path: Path) -> list[Path]:
    """Return the image files of a directory of splits, sorted by split, class and name."""
    found = []
    for split in _SPLITS:
        for folder in sorted((path / split).glob("[!.]*/")):
            files = [file for file in folder.iterdir() if _is_image(file.name)]
            if not files:
                raise DataError(f"{folder}: must hold images ({' '.join(_IMAGES)}), got none. Add some or delete it.")
            found += sorted(files)
    return found


def _is_image(name: str) -> bool:
    """Return whether a file name is an image's; ".hidden" and macOS's "._name.jpg" are not."""
    return name.lower().endswith(_IMAGES) and not name.startswith(".")


def _read_archives(archives: list[Path]) -> Iterator[_File]:
    """Yield the images of tar archives, whose paths end in split/class/name."""
    for archive in archives:
        with open_tar(archive, "Copy or pack it again.") as tar:
            for member in tar:
                split, label, name = (("", "", "") + PurePosixPath(member.name).parts)[-3:]
                if split not in _SPLITS or label.startswith(".") or not _is_image(name) or member.isdir():
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    raise DataError(f"{archive}: {member.name} must be a plain file, got a link. Pack it anew.")
                yield _File(split, label, name, f"{archive}: {member.name}", io.BytesIO(stream.read()))


def _decode(files: Iterable[_File], total: int | None) -> dict[tuple[str, str, str], np.ndarray]:
    """Return the pixels, uint8 (32, 32, 3), by split, class and name."""
    decoded = {}
    # One after another: threads gained nothing on images as small as these (0.2 ms each, once for every data set).
    for file in tqdm(files, total=total, desc="decoding", unit=" images"):
        key = file.split, file.label, file.name
        if key in decoded:
            raise DataError(f"{file.where}: {'/'.join(key)} occurs twice. Keep one of the two.")
        decoded[key] = _pixels(file)
    return decoded


def _pixels(file: _File) -> np.ndarray:
    """Decode one image to uint8 (32, 32, 3), resized if it has another size."""
    try:
        with Image.open(file.content) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file.where}: not a readable image ({error}). Replace or delete it.") from error
    if rgb.size != (SIZE, SIZE):
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _assemble(name: str, path: Path, decoded: dict[tuple[str, str, str], np.ndarray]) -> Images:
    """Sort decoded images by class and name, and check that the splits belong together."""
    keys = {split: sorted(key for key in decoded if key[0] == split) for split in _SPLITS}
    test = "test" if keys["test"] or not keys["val"] else "val"
    for split in ("train", test):
        if not keys[split]:
            raise DataError(f"dataset='folder:{path}': the split `{split}` has no images; expected {_LAYOUT}.")
    names, test_names = ({label for _, label, _ in keys[split]} for split in ("train", test))
    if names != test_names:
        raise DataError(
            f"dataset='folder:{path}': the splits must have the same classes; only in `train`: "
            f"{sorted(names - test_names)}, only in `{test}`: {sorted(test_names - names)}."
        )
    number = {label: i for i, label in enumerate(sorted(names))}
    arrays = []
    for split in ("train", test):
        arrays.append(np.stack([decoded[key] for key in keys[split]]))
        arrays.append(np.asarray([number[label] for _, label, _ in keys[split]], np.int32))
    return Images(name, *arrays, class_names=tuple(number))


def _read_cache(cache: Path, key: str, name: str) -> Images | None:
    """Return the cached arrays; `None` if there are none, or they are outdated or damaged."""
    if not cache.exists():
        return None
    try:
        # Opened here, because np.load leaves a file that it cannot read open.
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as saved:  # zip checksums find flipped bits
            if str(saved["key"]) != key:
                return None
            *arrays, class_names = (saved[field] for field in _CACHED)
            return Images(name, *arrays, class_names=tuple(class_names.tolist()))
    except Exception as error:  # damage shows as BadZipFile, zlib.error, ValueError, EOFError, KeyError, ...
        _log.warning("%s: damaged cache (%s); decoding the images again.", cache, error)
        return None


def _write_cache(cache: Path, key: str, images: Images) -> None:
    """Write the arrays; a cache that cannot be written costs time, not the run."""
    try:
        with atomic(cache, shared=True) as part, part.open("wb") as file:
            np.savez(file, key=np.asarray(key), **{field: getattr(images, field) for field in _CACHED})
    except OSError as error:
        _log.warning("%s: cannot be written (%s); the next run decodes the images again.", cache, error)
