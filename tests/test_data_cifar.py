"""CIFAR from synthetic archives, a stand-in for TFDS, and a local server; no network beyond 127.0.0.1."""

import dataclasses
import hashlib
import http.server
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import write_tar

from train import cifar_archive
from train.cifar_archive import RETRIES, SOURCES
from train.data import DataError, load

RECORDS = {"cifar10": (100, 20), "cifar100": (200, 100)}  # training and test records of the synthetic archives


def _files(name: str) -> dict[str, bytes]:
    """Record files of a synthetic CIFAR, by name."""
    source = SOURCES[name]
    rng = np.random.default_rng(7)
    content = {}
    for files, total in ((source.train_files, RECORDS[name][0]), (source.test_files, RECORDS[name][1])):
        for i, file in enumerate(files):
            count = total // len(files)
            records = rng.integers(0, 256, (count, source.label_bytes + 3072), dtype=np.uint8)
            records[:, 0] = 19 - np.arange(count) % 20  # coarse labels, overwritten where there are none
            records[:, source.label_bytes - 1] = (np.arange(count) + i) % len(source.class_names)
            content[file] = records.tobytes()
    return content


def _archive(name: str, folder: Path, content: dict[str, bytes] | None = None) -> Path:
    source = SOURCES[name]
    path = folder / source.archive
    write_tar(path, {f"{source.folder}/{file}": data for file, data in (content or _files(name)).items()})
    return path


def _patch(monkeypatch, name: str, **changes) -> None:
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], **changes))


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(request, tmp_path, monkeypatch) -> Path:
    """An archive of CIFAR-100, or of the data set that the test's parameter `name` gives, with its checksum."""
    name = request.getfixturevalue("name") if "name" in request.fixturenames else "cifar100"
    path = _archive(name, tmp_path)
    _patch(monkeypatch, name, md5=_md5(path))
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Small data sets, no TFDS, and addresses at a closed port of this machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for name, (num_train, num_test) in RECORDS.items():
        url = f"http://127.0.0.1:{port}/{SOURCES[name].archive}"
        _patch(monkeypatch, name, num_train=num_train, num_test=num_test, url=url)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # pooch waits before a retry


# CIFAR from files


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.usefixtures("archive")
def test_archive(name, tmp_path):
    images = load(name, data_dir=tmp_path)
    source, content = SOURCES[name], _files(name)
    assert images.name == name and images.notice is None
    assert images.num_classes == {"cifar10": 10, "cifar100": 100}[name] == len(set(images.class_names))
    assert list(images.class_names) == sorted(images.class_names)
    assert images.train_images.shape == (RECORDS[name][0], 32, 32, 3) and images.train_images.dtype == np.uint8
    assert images.test_labels.shape == (RECORDS[name][1],) and images.test_labels.dtype == np.int32
    # The last record of the last training file, pixel by pixel: channel-major, rows before columns.
    record = np.frombuffer(content[source.train_files[-1]], np.uint8)[-3072 - source.label_bytes :]
    assert images.train_labels[-1] == record[source.label_bytes - 1]
    pixels = record[source.label_bytes :]
    assert all(images.train_images[-1, 3, 5, c] == pixels[c * 1024 + 3 * 32 + 5] for c in range(3))
    mean, std = images.mean_and_std
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean[0], {"cifar10": 0.4914, "cifar100": 0.5071}[name], rtol=1e-6)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_extracted_files_equal_archive(name, archive, tmp_path):
    expected = load(name, data_dir=tmp_path).fingerprint
    archive.unlink()
    folder = tmp_path / SOURCES[name].folder
    folder.mkdir()
    for file, data in _files(name).items():
        (folder / file).write_bytes(data)
    assert load(name, data_dir=tmp_path).fingerprint == expected
    assert load(name, data_dir=folder).fingerprint == expected
    (folder / SOURCES[name].train_files[0]).unlink()
    with pytest.raises(DataError, match=r"missing .*bin"):
        load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_batch.bin", lambda data: data[:-1], r"test_batch\.bin: must hold .* got 61459"),
        ("test_batch.bin", lambda data: b"\x0a" + data[1:], "labels must be below 10, got 10"),
        ("data_batch_3.bin", lambda _: None, r"missing data_batch_3\.bin"),
    ],
)
def test_faulty_records(file, change, message, tmp_path, monkeypatch):
    content = _files("cifar10")
    content[file] = change(content[file])
    content = {name: data for name, data in content.items() if data is not None}
    _patch(monkeypatch, "cifar10", md5=_md5(_archive("cifar10", tmp_path, content)))
    with pytest.raises(DataError, match=message):
        load("cifar10", data_dir=tmp_path)


def test_a_damaged_archive_is_refused_not_passed_over(archive, tmp_path, monkeypatch):
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"md5 checksum must be .* got {_md5(archive)}.*Delete it"):
        load("auto", data_dir=tmp_path)
    _patch(monkeypatch, "cifar100", md5=_md5(archive))
    with pytest.raises(DataError, match="not a readable tar archive"):
        load("cifar100", data_dir=tmp_path)


def test_pickled_archive_is_never_read(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"would be run if unpickled")
    with pytest.raises(DataError, match=r"python\.tar\.gz is the pickled .* never read.*cifar-10-binary\.tar\.gz"):
        load("cifar10", data_dir=tmp_path)


# TensorFlow Datasets


def _fake_tfds(source) -> types.ModuleType:
    def data_source(dataset, *, split, download):
        assert download is False and dataset == "cifar100"
        images, labels = source[split]
        ids = [f"{split}_{i:05d}".encode() for i in range(len(labels))]
        pairs = zip(ids, images, labels, strict=True)
        return [{"id": name, "image": image, "label": label} for name, image, label in pairs][::-1]

    module = types.ModuleType("tensorflow_datasets")
    module.data_source = data_source
    return module


def test_tfds_gives_the_order_of_the_archive(archive, tmp_path, monkeypatch):
    given = load("cifar100", data_dir=tmp_path)
    archive.unlink()
    source = {"train": (given.train_images, given.train_labels), "test": (given.test_images, given.test_labels)}
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", _fake_tfds(source))
    images = load("auto", data_dir=tmp_path)
    assert (images.name, images.notice, images.fingerprint) == ("cifar100", None, given.fingerprint)


def test_tfds_not_installed_or_not_prepared(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"pip install 'farms-jax\[tfds\]'"):
        load("cifar100", data_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", _fake_tfds({}))
    with pytest.raises(DataError, match="not prepared as array_record .*download_and_prepare"):
        load("cifar100", data_dir=tmp_path)


# Download


class _Server(http.server.ThreadingHTTPServer):
    """Serves `content`; breaks the connection after `breaks[i]` bytes of answer i."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.status, self.asked = b"", None, 0
        self.breaks: list[int] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self):
        self.server.asked += 1
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.breaks.pop(0) if self.server.breaks else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the synthetic CIFAR-100."""
    served = tmp_path / "served"
    served.mkdir()
    archive = _archive("cifar100", served)
    server = _Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.content = archive.read_bytes()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    _patch(monkeypatch, "cifar100", url=url, md5=_md5(archive))
    yield server
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    images, again = (load(dataset, data_dir=tmp_path / "new" / "folder") for dataset in ("auto", "cifar100"))
    assert images.name == "cifar100" and images.notice is None and len(images.train_labels) == 200
    assert again.fingerprint == images.fingerprint
    assert server.asked == 1  # the second time from disk


def test_a_broken_connection_is_tried_again(server, tmp_path):
    server.breaks = [70_000] * RETRIES
    load("cifar100", data_dir=tmp_path)
    assert server.asked == RETRIES + 1


def test_a_connection_that_always_breaks_leaves_no_file(server, tmp_path):
    server.breaks = [1000] * (RETRIES + 1)
    with pytest.raises(DataError, match="IncompleteRead"):
        load("cifar100", data_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["cifar-100-binary.tar.gz.lock"]


def test_other_content_is_refused(server, tmp_path):
    server.content = b"<html>Please log in to this network</html>"
    with pytest.raises(DataError, match="hash of downloaded file"):
        load("cifar100", data_dir=tmp_path)
    assert not list(tmp_path.glob("*.gz"))


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, RETRIES + 1)])
def test_server_errors(status, attempts, server, tmp_path):
    server.status = status
    with pytest.raises(DataError, match=str(status)):
        load("cifar100", data_dir=tmp_path)
    assert server.asked == attempts


def test_runs_at_once_download_once(server, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: load("cifar100", data_dir=tmp_path).fingerprint, range(3)))
    assert len(set(loaded)) == 1
    assert server.asked == 1


def test_silent_server_counts_as_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_archive, "TIMEOUT", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        _patch(monkeypatch, "cifar100", url=f"http://127.0.0.1:{sock.getsockname()[1]}/cifar-100-binary.tar.gz")
        images = load("auto", data_dir=tmp_path)
    assert images.notice is not None and "no connection" in images.notice


def test_a_file_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cifar-100-binary.tar.gz").mkdir()
    with pytest.raises(DataError, match="IsADirectoryError|PermissionError"):
        load("cifar100", data_dir=tmp_path)


def test_named_never_falls_back(tmp_path):
    source = SOURCES["cifar10"]
    with pytest.raises(DataError) as error:
        load("cifar10", data_dir=tmp_path)
    for part in (source.url, str(tmp_path / source.archive), "by hand", "--dataset digits"):
        assert part in str(error.value)


def test_auto_falls_back_with_a_notice(tmp_path):
    images = load("auto", data_dir=tmp_path)
    assert images.name == "digits (scikit-learn, 32x32 RGB)" and images.notice is not None
    for part in (images.name, "CIFAR-100", "by hand", SOURCES["cifar100"].url):
        assert part in images.notice
    assert images.fingerprint == load("digits").fingerprint
