"""Fine-tune DPOT on 2D compressible Navier-Stokes data with TB_Sigmoid and FARMS.

python -m sciml.dpot --tb farms                               generated data, pretraining, then all three settings
python -m sciml.dpot --recipe tiny-25-farms --data FILE --weights model_Ti.safetensors      a cell of Table 4
python -m sciml.dpot --resume runs/NAME                       go on with a run that was stopped
"""

import argparse
import time
from pathlib import Path

import tyro

from farms_jax.errors import InputError, reported
from farms_jax.rundir import read_config, write_config
from sciml.config import RECIPES, Config
from sciml.experiment import complete, prepare, run_experiment


def main() -> None:
    """Run the program; a mistake in settings or data is one line on stderr, and exit status 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR")
    parser.add_argument("--recipe", metavar="NAME")
    special, settings = parser.parse_known_args()
    with reported("sciml.dpot", "; go on with --resume and the run's directory"):
        if special.recipe == "list":
            print("\n".join(RECIPES))
        elif special.resume is not None:
            resume(special.resume, settings)
        else:
            start(special.recipe, settings)


def start(recipe: str | None, settings: list[str]) -> None:
    """Begin a run.

    Args:
        recipe: name of the settings to start from.
        settings: command line that changes them.

    Raises:
        InputError: there is no such recipe, a setting is out of its range, or data cannot be used.
    """
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"--recipe: there is no {recipe!r}; `--recipe list` names all {len(RECIPES)}")
    usage = "\n\n".join(filter(None, (__doc__ or "").splitlines()))
    description = f"{usage}\n\nBesides the options below: --recipe NAME, --resume RUN_DIR."
    default = RECIPES[recipe] if recipe else Config()
    config = tyro.cli(Config, default=default, args=settings, prog="sciml.dpot", description=description)
    config.check()
    config = complete(config)
    experiment = prepare(config)
    source = "".join(c if c.isalnum() or c in "._" else "-" for c in experiment.finetune.name.removesuffix(".hdf5"))
    run = config.out / f"{source}-{config.model}-{config.tb}-{time.strftime('%Y%m%d-%H%M%S')}"
    write_config(run, config, experiment.facts())
    print(run_experiment(run, experiment))


def resume(run: Path, settings: list[str]) -> None:
    """Go on with a run from its last checkpoints.

    Args:
        run: its directory.
        settings: must be empty, a run keeps its settings.

    Raises:
        InputError: there is no run, settings were given, or the data are not the same any more.
    """
    if settings:
        raise InputError(f"--resume goes on with the run's own settings; leave out {' '.join(settings)}")
    config, before = read_config(run, Config)
    experiment = prepare(config)
    experiment.check_same(before)
    print(run_experiment(run, experiment))


if __name__ == "__main__":
    main()
