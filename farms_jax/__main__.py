"""The command `farms`, also as `python -m farms_jax`."""

import argparse
import sys
from typing import NoReturn

import farms_jax
from farms_jax.programs.commands import COMMANDS, run_command
from farms_jax.programs.exits import run_and_end

_DESCRIPTION = "How well is each layer of a network trained? Measure it, and train, prune and fine-tune by it."


def main() -> None:
    """Run a command of `farms`; without the packages that it needs, one line says how to install them."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        _parser().parse_args(sys.argv[1:2])  # ends the process: --help, --version, or a mistake
    sys.argv[:2] = [f"farms {command}"]
    run_command(command)


def command() -> NoReturn:
    """Run `farms` and end the process."""
    run_and_end(main)


def _parser() -> argparse.ArgumentParser:
    wide = max(map(len, COMMANDS))
    lines = [
        f"  {name:{wide}}  {command.summary}{f'  [{command.extra}]' if command.extra else ''}"
        for name, command in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="farms",
        usage="farms [--help] [--version] COMMAND ...",
        description="\n".join([_DESCRIPTION, "", "commands:", *lines]),
        epilog='Options: farms COMMAND --help. [EXTRA] is what a command needs: pip install "farms-jax[EXTRA]"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"farms-jax {farms_jax.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    command()
