"""The command line of a program with named recipes and runs that resume; needs tyro, an extra of the programs."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from farms_jax.errors import InputError
from farms_jax.programs.exits import reported

Config = TypeVar("Config")
# The flag is --seed in every program, whether it takes one or several.
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(name="seed", aliases=["--seeds"])]


def usage(docstring: str | None, name: str) -> str:
    r"""Return a program's docstring as the description of its `--help`.

    >>> usage("Train.\n\npython -m train.cifar --tb farms   on CIFAR", "farms train")
    'Train.\n\nfarms train --tb farms   on CIFAR'

    Args:
        docstring: Lines that begin with `python -m MODULE` are commands that start the program.
        name: What was called: `train.cifar` with `python -m`, or `farms train`.

    Returns:
        Its lines as paragraphs, with the command that was called.
    """
    command = name if name.startswith("farms ") else f"python -m {name}"
    lines = re.sub(r"^python -m \S+", command, docstring or "", flags=re.MULTILINE).splitlines()
    return "\n\n".join(filter(None, lines))


def run_program(
    name: str,
    description: str,
    *,
    default: Config,
    recipes: Mapping[str, Config],
    start: Callable[[Config], str],
    resume: Callable[[Path], str],
) -> None:
    """Start a run with the settings of the command line, or go on with one; what it returns goes to stdout.

    `--recipe NAME` starts from named settings, `--recipe list` names them, `--resume RUN_DIR` goes on with a run; every
    other option is a field of the settings. A mistake is one line on stderr, and exit status 2; a stop by Ctrl-C or
    SIGTERM is one line too, and exit status 130 or 143 (see `reported`).

    Args:
        name: What the program is called in its messages.
        description: What `--help` says of it, see `usage`.
        default: settings, a dataclass.
        recipes: settings by name.
        start: begins a run.
        resume: goes on with the run of a directory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR")
    parser.add_argument("--recipe", metavar="NAME")
    special, settings = parser.parse_known_args()
    with reported(name):  # a stop inside a run says how to go on, see `run_directory.at_work`
        if special.recipe == "list":
            result = "\n".join(recipes)
        elif special.resume is None:
            result = start(_settings(name, description, default, recipes, special.recipe, settings))
        else:
            result = resume(_alone(special.resume, settings))
        sys.stdout.write(f"{result}\n")


def _settings(
    name: str, description: str, default: Config, recipes: Mapping[str, Config], recipe: str | None, given: list[str]
) -> Config:
    if recipe is not None and recipe not in recipes:
        raise InputError(f"--recipe: there is no {recipe!r}; `--recipe list` names all {len(recipes)}")
    description = f"{description}\n\nBesides the options below: --recipe NAME, --resume RUN_DIR."
    start_from = default if recipe is None else recipes[recipe]
    return tyro.cli(type(default), default=start_from, args=given, prog=name, description=description)


def _alone(run: Path, settings: list[str]) -> Path:
    if settings:
        raise InputError(f"--resume goes on with the run's own settings; leave out {' '.join(settings)}")
    return run


def run_name(*parts: str) -> str:
    """Name a new run directory.

    >>> run_name("digits (bundled)", "resnet18")[:27]
    'digits--bundled--resnet18-2'

    Args:
        parts: what tells runs apart.

    Returns:
        The parts, in letters that any file system takes, and the time.
    """
    letters = "".join(c if c.isalnum() or c in "._-" else "-" for c in "-".join(parts))
    return f"{letters}-{time.strftime('%Y%m%d-%H%M%S')}"
