"""Imports of packages that come with an extra of farms-jax: the error for a missing one names the extra."""

import contextlib
from collections.abc import Generator

from farms_jax.errors import MissingPackageError


@contextlib.contextmanager
def from_extra(extra: str, needed_by: str = "") -> Generator[None]:
    """Import packages of an extra in the body; where one is missing, the error says what needs it.

    >>> with from_extra("train", "model.bin: this format"):
    ...     import no_such_package
    Traceback (most recent call last):
    farms_jax.errors.MissingPackageError: model.bin: this format needs no_such_package; pip install "farms-jax[train]"

    Raises:
        MissingPackageError: a package is not installed.
        ModuleNotFoundError: a module of farms_jax itself is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "farms_jax":  # not a missing extra but a mistake of ours
            raise
        told = f"{needed_by} needs {package}" if needed_by else f"{package} is not installed"
        raise MissingPackageError(told, f'; pip install "farms-jax[{extra}]"') from error
