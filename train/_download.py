"""Download one file with pooch: checksum, retries, and resumption of a partial download.

pooch throws a partial file away, so this module gives it a downloader that keeps the bytes in
`<name>.part` and asks the server for the rest only. pooch still checks the md5 of the whole and
puts the file in place with one rename, so a file under its final name is always complete.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3.exceptions
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: without the lock two first runs at once each fail their checksum and retry.
    fcntl = None

CONNECT_TIMEOUT = 10.0  # seconds for one address
READ_TIMEOUT = 30.0  # seconds without a byte
# A host name with several dead addresses, or a dead name server, multiplies the connect timeout.
# No answer at all within this many seconds counts as offline, whatever the reason.
ANSWER_TIMEOUT = 12.0
RETRIES = 2
CHUNK = 1 << 16  # bytes


class DownloadError(OSError):
    """The file could not be downloaded; the text is the reason, without a remedy."""


def download(url: str, directory: Path, md5: str) -> Path:
    """Downloads `url` into `directory`, resuming what an earlier call left in `<name>.part`.

    Args:
        url: Address of the file; its last component is the name of the file.
        directory: Where to put it; created if need be.
        md5: Expected checksum, 32 hexadecimal digits.

    Returns:
        The path of the complete file, whose checksum is `md5`.

    Raises:
        DownloadError: If the server cannot be reached, refuses, sends another file, or the file
            cannot be written.
    """
    name = url.rsplit("/", 1)[-1]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        registry = {name: f"md5:{md5}"}
        remote = pooch.create(path=directory, base_url="", registry=registry, urls={name: url}, retry_if_failed=RETRIES)
        with _one_at_a_time(directory / f"{name}.lock"):
            downloader = ResumingDownloader(directory / f"{name}.part")
            # pooch passes these arguments by position, but its type hint names them otherwise.
            return Path(remote.fetch(name, downloader=downloader))  # pyright: ignore[reportArgumentType]
    except DownloadError:
        raise
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch's checksum error is a ValueError
        raise DownloadError(f"{type(error).__name__}: {error}") from error


class ResumingDownloader:
    """Downloader for pooch that keeps a partial file and asks for the missing bytes by `Range`."""

    def __init__(self, part: Path):
        """Keeps the partial download in the file `part`."""
        self.part = part

    def __call__(self, url: str, output_file: Any, pooch: Any = None, check_only: bool = False) -> None:
        """Downloads `url` to the path `output_file`; the other arguments are pooch's protocol.

        Args:
            url: Address of the file.
            output_file: Path of pooch's temporary file, replaced in one step at the end.
            pooch: The calling `pooch.Pooch`, unused.
            check_only: Not supported, since `fetch` never sets it.

        Raises:
            NotImplementedError: If `check_only` is set.
        """
        if check_only:
            raise NotImplementedError("check_only: not supported; call `requests.head` instead.")
        offset = self.part.stat().st_size if self.part.exists() else 0
        response = _request(url, offset)
        if offset and response.headers.get("Content-Range", "").split("-")[0] != f"bytes {offset}":
            # The server ignores ranges (200), or the partial file is longer than the file (416):
            # appending would spoil it, so begin anew.
            offset = 0
            if response.status_code != 200:
                response.close()
                response = _request(url, offset)
        with response, self.part.open("ab" if offset else "wb") as file:
            _copy(response, file, offset, Path(url).name)
        os.replace(self.part, output_file)


def _request(url: str, offset: int) -> requests.Response:
    """Asks for `url` from byte `offset` on, waiting for the headers only.

    Args:
        url: Address of the file.
        offset: Number of bytes already here.

    Returns:
        The open response: 200, 206, or 416 (nothing at that offset).

    Raises:
        DownloadError: If there is no connection, no answer in time, or a refusal.
    """
    # "identity": a server that labels a .tar.gz as gzip-encoded would have it unpacked on the way.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    answer: queue.Queue[requests.Response | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answer.put(requests.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)))
        except Exception as error:  # handed to the waiting thread, whatever it is
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=ANSWER_TIMEOUT)
    except queue.Empty:
        raise DownloadError(f"no answer within {ANSWER_TIMEOUT:g} s") from None
    # A DownloadError is not retried by pooch: an offline machine and a missing file are final.
    if isinstance(response, Exception):
        raise DownloadError(f"no connection ({response})") from response
    if 400 <= response.status_code < 500 and response.status_code != 416:
        response.close()
        raise DownloadError(f"the server answered {response.status_code} {response.reason}")
    if response.status_code != 416:
        response.raise_for_status()
    return response


def _copy(response: requests.Response, file: Any, offset: int, name: str) -> None:
    """Appends the body of a response to a file, with a progress bar.

    Args:
        response: The open response.
        file: Binary file, open for appending.
        offset: Number of bytes already in it.
        name: Name shown at the bar.

    Raises:
        requests.ConnectionError: If the connection breaks before the last byte.
    """
    length = response.headers.get("Content-Length")
    total = offset + int(length) if length else None
    with tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True) as bar:
        try:
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
        except urllib3.exceptions.HTTPError as error:  # pooch retries the errors of requests only
            raise requests.ConnectionError(f"connection lost ({error})") from error
    if total is not None and file.tell() < total:
        raise requests.ConnectionError(f"connection lost after {file.tell()} of {total} bytes")


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Generator[None]:
    """Makes a second process wait, so that runs started together download once."""
    if fcntl is None:
        yield
        return
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
