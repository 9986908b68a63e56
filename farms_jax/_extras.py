"""Packages that come with an extra of farms-jax: where one is not installed, the error names the extra."""

import contextlib
from collections.abc import Generator

from farms_jax.errors import InputError


@contextlib.contextmanager
def from_extra(extra: str, needed_by: str = "") -> Generator[None]:
    """Import inside what an extra brings.

    >>> with from_extra("train", "model.bin: this format"):
    ...     import no_such_package
    Traceback (most recent call last):
    farms_jax.errors.InputError: model.bin: this format needs no_such_package; pip install "farms-jax[train]"

    Args:
        extra: Extra whose packages are imported.
        needed_by: What needs them; by default they are only said to be missing.

    Yields:
        Nothing.

    Raises:
        InputError: A package is not installed.
        ModuleNotFoundError: A module of farms_jax is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "farms_jax":  # not a missing extra but a mistake of ours
            raise
        told = f"{needed_by} needs {package}" if needed_by else f"{package} is not installed"
        raise InputError(f'{told}; pip install "farms-jax[{extra}]"') from error
