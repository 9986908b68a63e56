"""Data sets of the Hugging Face hub: loaded from it or its cache, or refused in seconds without internet."""

import contextlib
import functools
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

from farms_jax._extras import from_extra
from farms_jax.errors import InputError, one_line

from .documents import KINDS

_SECONDS = 5.0  # until the hub counts as unreachable


@contextlib.contextmanager
def offline_where_unreachable() -> Generator[None]:
    """Let `datasets` use only its cache, without minutes of retries, where the hub cannot be reached."""
    from datasets import config  # noqa: PLC0415
    from huggingface_hub import constants  # noqa: PLC0415

    settings: tuple[Any, ...] = (config, constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    offline = any(before) or not _reachable(constants.ENDPOINT)
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = offline
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


@functools.cache
def _reachable(endpoint: str) -> bool:
    """Ask the hub once per process; the proxies of the environment are used."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        # Other certificates than Python's own may be known to the library that will download.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False


def load(flag: str, name: str, *arguments: str, **keywords: Any) -> Any:
    """Call `datasets.load_dataset` with the other arguments; the error names the option and the data set."""
    with from_extra("prune", f"{flag} {name}"):
        import datasets
    try:
        with offline_where_unreachable():
            return datasets.load_dataset(*arguments, **keywords)
    except Exception as error:  # of several network libraries
        raise InputError(
            f"{flag} {name}: cannot be had from the hub ({one_line(error)}); give {flag} a file instead: {KINDS}"
        ) from error
