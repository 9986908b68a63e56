"""The command `farms`, also as `python -m farms_jax`."""

import sys
from typing import NoReturn

from farms_jax.programs.exits import run_and_end


def main() -> None:
    """Run `farms`; without the packages that it needs, say how to install them."""
    try:
        from farms_jax.diagnosis.cli import main as run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.stderr.write(f'farms: {error.name} is not installed; pip install "farms-jax[diagnose]"\n')
        sys.exit(2)
    run()


def command() -> NoReturn:
    """Run `farms` and end the process."""
    run_and_end(main)


if __name__ == "__main__":
    command()
