"""The command line of a program with named recipes and runs that resume; needs tyro, an extra of the programs.

`--recipe NAME` starts from named settings, `--recipe list` names them, `--resume RUN_DIR` goes on with a run; every
other option is a field of the settings. A mistake is one line on stderr, and exit status 2; a stop by Ctrl-C or SIGTERM
is one line too, and exit status 130 or 143 (see `reported`).
"""

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
    r"""Return a program's docstring as the description of its `--help`: lines as paragraphs, the command as called.

    >>> usage("Train.\n\npython -m train.cifar --tb farms   on CIFAR", "farms train")
    'Train.\n\nfarms train --tb farms   on CIFAR'
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
    """Call `start` with the settings of the command line, a dataclass, or `resume`; print what they return."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR")
    parser.add_argument("--recipe", metavar="NAME")
    special, given = parser.parse_known_args()
    recipe = special.recipe
    with reported(name):  # a stop inside a run says how to go on, see `run_directory.at_work`
        if recipe == "list":
            result = "\n".join(recipes)
        elif special.resume is None:
            if recipe is not None and recipe not in recipes:
                raise InputError(f"--recipe: there is no {recipe!r}; `--recipe list` names all {len(recipes)}")
            start_from = default if recipe is None else recipes[recipe]
            shown = f"{description}\n\nBesides the options below: --recipe NAME, --resume RUN_DIR."
            result = start(tyro.cli(type(default), default=start_from, args=given, prog=name, description=shown))
        elif given:
            raise InputError(f"--resume goes on with the run's own settings; leave out {' '.join(given)}")
        else:
            result = resume(special.resume)
        sys.stdout.write(f"{result}\n")


def run_name(*parts: str) -> str:
    """Return the name of a new run directory: parts that tell runs apart, in letters for any file system, and the time.

    >>> run_name("digits (bundled)", "resnet18")[:27]
    'digits--bundled--resnet18-2'
    """
    letters = "".join(c if c.isalnum() or c in "._-" else "-" for c in "-".join(parts))
    return f"{letters}-{time.strftime('%Y%m%d-%H%M%S')}"
