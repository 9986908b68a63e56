"""Train an image classifier with TempBalance and FARMS.

python -m train.cifar --tb farms                   CIFAR-100 where it can be had, else a short run on bundled digits
python -m train.cifar --recipe resnet18-ls-ours    a row of the paper's Table 13; `--recipe list` names all
python -m train.cifar --resume runs/NAME           go on with a run that was stopped
"""

import argparse
import time
from pathlib import Path

import tyro

from farms_jax.errors import reported
from farms_jax.rundir import RunError, read_config, write_config
from train.config import RECIPES, Config, resolve
from train.data import load
from train.experiment import check_same_data, facts, train_run


def main() -> None:
    """Run the program; a mistake in settings or data is one line on stderr, and exit status 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR")
    parser.add_argument("--recipe", metavar="NAME")
    special, settings = parser.parse_known_args()
    with reported("train.cifar", when_stopped="; go on with --resume and the run's directory"):
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
        RunError: there is no such recipe.
        InputError: a setting is out of its range.
    """
    if recipe is not None and recipe not in RECIPES:
        raise RunError(f"--recipe: there is no {recipe!r}; `--recipe list` names all {len(RECIPES)}")
    usage = "\n\n".join(filter(None, (__doc__ or "").splitlines()))
    description = f"{usage}\n\nBesides the options below: --recipe NAME, --resume RUN_DIR."
    default = RECIPES[recipe] if recipe else Config()
    config = tyro.cli(Config, default=default, args=settings, prog="train.cifar", description=description)
    config.check()
    images = load(config.dataset, data_dir=config.data_dir, limit_train=config.limit_train)
    config = resolve(config, small=images.name.startswith("digits"))
    if config.tb != "none":  # a baseline has no factors
        config.check()  # again: a factor that was given has to fit the other, filled in
    data = "".join(c if c.isalnum() else "-" for c in images.name.split(":")[0].split(" ")[0])
    run = config.out / f"{data}-{config.model}-{config.tb}-{time.strftime('%Y%m%d-%H%M%S')}"
    write_config(run, config, facts(images))
    print(train_run(run, config, images))


def resume(run: Path, settings: list[str]) -> None:
    """Go on with a run from its last checkpoints.

    Args:
        run: its directory.
        settings: must be empty, a run keeps its settings.

    Raises:
        RunError: there is no run, settings were given, or the data are not the same any more.
    """
    if settings:
        raise RunError(f"--resume goes on with the run's own settings; leave out {' '.join(settings)}")
    config, before = read_config(run, Config)
    images = load(before["dataset"], data_dir=config.data_dir, limit_train=config.limit_train)
    check_same_data(images, before)
    print(train_run(run, config, images))


if __name__ == "__main__":
    main()
