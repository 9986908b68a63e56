"""The command `farms`, also as `python -m farms_jax`."""

import sys


def main() -> None:
    """Run `farms`; without the packages that it needs, say how to install them."""
    try:
        from farms_jax.diagnosis.cli import main as run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.stderr.write(f'farms: {error.name} is not installed; pip install "farms-jax[diagnose]"\n')
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
