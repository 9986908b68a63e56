"""Download one file with pooch: it checks the checksum, retries, and gives a complete file its name in one step."""

from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock

TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte
RETRIES = 2


class DownloadError(OSError):
    """The file could not be downloaded; the text is the reason, without a remedy."""


def download(url: str, directory: Path, md5: str) -> Path:
    """Return the path of a file of that md5 checksum in the directory, downloaded if need be.

    Raises:
        DownloadError: the server cannot be reached, refuses or sends another file, or the file cannot be written.
    """
    name = url.rsplit("/", 1)[-1]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remote = pooch.create(
            directory, base_url="", registry={name: f"md5:{md5}"}, urls={name: url}, retry_if_failed=RETRIES
        )
        with FileLock(directory / f"{name}.lock"):  # runs that are started together download once
            # pooch passes these arguments by position, but its type hint names them otherwise.
            return Path(remote.fetch(name, downloader=_download))  # pyright: ignore[reportArgumentType]
    except DownloadError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pooch's checksum error is a ValueError
        raise DownloadError(f"{type(error).__name__}: {error}") from error


def _download(url: str, output_file: Any, pooch_of_file: Any) -> None:
    """Download as pooch does; an offline machine and a missing file are final, and not tried again."""
    # "identity": a server that labels a .tar.gz as gzip-encoded would have it unpacked on the way.
    headers = {"Accept-Encoding": "identity"}
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT, headers=headers)
    try:
        fetch(url, output_file, pooch_of_file)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise DownloadError(f"no connection ({error})") from error
    except requests.HTTPError as error:
        answer = error.response
        if answer is None or answer.status_code >= 500:
            raise
        raise DownloadError(f"the server answered {answer.status_code} {answer.reason}") from error
