"""Digits, folders and arguments of `train.data`; test_data_cifar.py has the rest."""

import dataclasses
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_tar
from PIL import Image

from train import image_folder
from train.data import DataError, load

# Digits


def test_digits():
    np.random.seed(1)
    images = load("digits")
    np.random.seed(2)
    assert load("digits").fingerprint == images.fingerprint  # no global randomness
    assert images.name == "digits (scikit-learn, 32x32 RGB)" and images.notice is None
    assert images.train_images.shape == (1442, 32, 32, 3) and images.test_images.shape == (355, 32, 32, 3)
    assert images.train_images.dtype == np.uint8 and images.train_labels.dtype == np.int32
    assert images.train_images.min() == 0 and images.train_images.max() == 255
    assert images.class_names == tuple("0123456789")
    train, test = np.bincount(images.train_labels), np.bincount(images.test_labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.006)
    scaled = images.train_images.reshape(-1, 3) / 255
    np.testing.assert_allclose(images.mean_and_std, (scaled.mean(0), scaled.std(0)), rtol=1e-5)


def test_fingerprint_sees_every_array():
    images = load("digits", limit_train=20)
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(images, field).copy()
        changed.flat[-1] ^= 1
        assert dataclasses.replace(images, **{field: changed}).fingerprint != images.fingerprint


@pytest.mark.parametrize("limit", [10, 25, 1442])
def test_limit_train_keeps_classes_balanced(limit):
    images, whole = load("digits", limit_train=limit), load("digits")
    counts = np.bincount(images.train_labels, minlength=10)
    assert len(images.train_images) == len(images.train_labels) == limit
    assert counts.max() - counts.min() <= (1 if limit < 1442 else 10)
    np.testing.assert_array_equal(images.test_images, whole.test_images)


# Folders


def _jpeg(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB", form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def content() -> dict[str, bytes]:
    """Six training and four test images of two classes, in an order that is not sorted."""
    train = {f"train/{label}/{i:04d}.jpg": _jpeg(10 * i + len(label)) for i in (2, 0, 1) for label in ("dog", "apple")}
    return train | {f"test/{label}/{i:04d}.jpg": _jpeg(50 * i) for i in (1, 0) for label in ("dog", "apple")}


def _folder_of(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def plain(content, tmp_path) -> Path:
    """The content in a directory."""
    return _folder_of(tmp_path / "plain", content)


def _load_folder(path: Path, tmp_path: Path, **kwargs):
    return load(f"folder:{path}", data_dir=tmp_path / "cache", **kwargs)


def test_folder_tar_and_folder_of_tars_are_equal(content, plain, tmp_path):
    paths = [plain]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        paths.append(tmp_path / f"images{suffix}")
        write_tar(paths[-1], {f"./images/{name}": data for name, data in content.items()}, mode)
    paths.append(tmp_path / "tars")
    paths[-1].mkdir()
    for split in ("train", "test"):
        part = {name: data for name, data in content.items() if name.startswith(split)}
        write_tar(paths[-1] / f"images-{split}.tar.xz", part, "w:xz")
    loaded = [_load_folder(path, tmp_path) for path in paths]
    assert [images.name for images in loaded] == [f"folder:{path}" for path in paths]
    assert len({images.fingerprint for images in loaded}) == 1
    images = loaded[0]
    assert images.class_names == ("apple", "dog") and images.notice is None
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and images.test_labels.tolist() == [0, 0, 1, 1]
    with Image.open(io.BytesIO(content["train/apple/0001.jpg"])) as image:
        np.testing.assert_array_equal(images.train_images[1], np.asarray(image))
    np.testing.assert_allclose(images.mean_and_std[0], images.train_images.reshape(-1, 3).mean(0) / 255, rtol=1e-5)


def test_val_stands_in_for_test(plain, tmp_path):
    expected = _load_folder(plain, tmp_path).fingerprint
    (plain / "test").rename(plain / "val")
    assert _load_folder(plain, tmp_path).fingerprint == expected


def test_sizes_modes_and_other_files(content, tmp_path):
    content["train/apple/9.PNG"] = _jpeg(1, (64, 48), "RGBA", "PNG")
    content["train/dog/9.jpeg"] = _jpeg(2, (20, 20), "L")
    content |= {"train/dog/._0000.jpg": b"macOS", "train/dog/notes.txt": b"text", "train/.cache/a.jpg": b"hidden"}
    images = _load_folder(_folder_of(tmp_path / "plain", content), tmp_path)
    assert images.train_images.shape == (8, 32, 32, 3) and images.num_classes == 2
    write_tar(tmp_path / "all.tar", content, "w")
    assert _load_folder(tmp_path / "all.tar", tmp_path).fingerprint == images.fingerprint


def test_cache_is_used_and_follows_its_source(plain, tmp_path, monkeypatch):
    first = _load_folder(plain, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "_pixels", lambda file: pytest.fail("decoded again"))
        second = _load_folder(plain, tmp_path)
    assert second.fingerprint == first.fingerprint and second.class_names == first.class_names
    (plain / "train/dog/0001.jpg").write_bytes(_jpeg(99))
    assert _load_folder(plain, tmp_path).fingerprint != first.fingerprint
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npz"]


def _flip_a_bit(data):
    third = len(data) // 3  # inside the training images, by far the largest array
    return data[:third] + bytes([data[third] ^ 4]) + data[third + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda data: data[:-900], _flip_a_bit])
def test_damaged_cache_is_rebuilt(damage, plain, tmp_path, caplog):
    first = _load_folder(plain, tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert _load_folder(plain, tmp_path).fingerprint == first.fingerprint
    assert "damaged cache" in caplog.text
    assert len(cache.read_bytes()) == len(whole)


def test_unwritable_cache_is_no_error(plain, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(_load_folder(plain, tmp_path).train_labels) == 6
    assert "No space left" in caplog.text and not list((tmp_path / "cache").iterdir())


def test_limit_train_of_a_folder_sorted_by_class(plain, tmp_path):
    assert _load_folder(plain, tmp_path, limit_train=2).train_labels.tolist() == [0, 1]


def test_constant_images_have_a_positive_deviation(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 20, 30)).save(buffer, "PNG")
    content = {f"{split}/one/1.png": buffer.getvalue() for split in ("train", "test")}
    mean, std = _load_folder(_folder_of(tmp_path / "plain", content), tmp_path).mean_and_std
    np.testing.assert_allclose(mean, np.array([10, 20, 30]) / 255, rtol=1e-6)
    np.testing.assert_allclose(std, 1 / 255, rtol=1e-6)


def _drop(content, *starts):
    return {name: data for name, data in content.items() if not name.startswith(starts)}


FOLDER_ERRORS = {
    "no train": (lambda c: _drop(c, "train"), "split `train` has no images"),
    "no test": (lambda c: _drop(c, "test"), "split `test` has no images"),
    "class only in train": (lambda c: _drop(c, "test/dog"), r"only in `train`: \['dog'\], only in `test`: \[\]"),
    "class only in test": (lambda c: c | {"test/owl/1.jpg": _jpeg(1)}, r"only in `test`: \['owl'\]"),
    "broken image": (lambda c: c | {"train/dog/7.jpg": b"no image"}, r"train/dog/7\.jpg: not a readable image"),
    "truncated image": (lambda c: c | {"train/dog/8.jpg": _jpeg(1)[:-200]}, r"train/dog/8\.jpg: not a readable image"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folder_errors(case, content, tmp_path):
    change, message = FOLDER_ERRORS[case]
    write_tar(tmp_path / "images.tar.gz", change(content))
    for path in (tmp_path / "images.tar.gz", _folder_of(tmp_path / "plain", change(content))):
        with pytest.raises(DataError, match=message):
            _load_folder(path, tmp_path)
    assert not list(tmp_path.glob("cache/*"))


def test_missing_and_empty_paths(plain, tmp_path):
    with pytest.raises(DataError, match="nowhere': no such file or directory"):
        _load_folder(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must hold split/class/name.jpg"):
        _load_folder(tmp_path / "empty", tmp_path)
    (plain / "train" / "owl").mkdir()
    with pytest.raises(DataError, match="owl: must hold images"):
        _load_folder(plain, tmp_path)


def test_bad_archives(content, tmp_path):
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"text\.tar: not a readable tar archive"):
        _load_folder(tmp_path / "text.tar", tmp_path)
    for mode in ("xz", "gz"):
        cut = tmp_path / f"cut.tar.{mode}"
        write_tar(cut, content, f"w:{mode}")
        cut.write_bytes(cut.read_bytes()[:-600])
        with pytest.raises(DataError, match=r"cut\.tar\..z: not a readable tar archive"):
            _load_folder(cut, tmp_path)


def test_duplicates_and_links_in_archives(content, tmp_path):
    folder = tmp_path / "twice"
    folder.mkdir()
    write_tar(folder / "a.tar", content, "w")
    write_tar(folder / "b.tar.gz", content)
    with pytest.raises(DataError, match=r"b\.tar\.gz: .* occurs twice"):
        _load_folder(folder, tmp_path)
    with tarfile.open(folder / "a.tar", "a") as tar:
        link = tarfile.TarInfo("train/dog/link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "train/dog/0000.jpg"
        tar.addfile(link)
    with pytest.raises(DataError, match="link.jpg must be a plain file, got a link"):
        _load_folder(folder / "a.tar", tmp_path)


# Arguments


UNKNOWN = "dataset must be one of auto, cifar100, cifar10, digits, folder:PATH"
NO_COUNT = "limit_train must be None or an integer >= 1, got"


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        *((dataset, {}, UNKNOWN) for dataset in ("CIFAR10", "folder:", "folder", "")),
        *(("digits", {"limit_train": limit}, NO_COUNT) for limit in (0, 1.5, True, "10")),
        ("digits", {"limit_train": 1443}, "limit_train must be at most 1442 for this data set, got 1443"),
        ("digits", {"data_dir": Path(__file__)}, "data_dir must be a directory, got the file"),
    ],
)
def test_bad_arguments(dataset, settings, message):
    with pytest.raises(DataError, match=message):
        load(dataset, **settings)


def test_import_loads_nothing_heavy():
    code = "import sys, train.data; print(*({'sklearn', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
