"""Train an image classifier with TempBalance and FARMS.

python -m train.cifar --tb farms                   CIFAR-100 where it can be had, else a short run on bundled digits
python -m train.cifar --recipe resnet18-ls-ours    a row of the paper's Table 13; `--recipe list` names all
python -m train.cifar --resume runs/NAME           go on with a run that was stopped
"""

from pathlib import Path

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.cifar", extra="train")

from farms_jax.programs.command_line import run_name, run_program, usage
from farms_jax.programs.config_file import read_config, write_config
from farms_jax.programs.run_directory import at_work

from .config import RECIPES, Config, resolve
from .data import load
from .training import check_same_data, facts, train_run


def main(name: str = "train.cifar") -> None:
    """Run the program, called `name` in its messages."""
    run_program(name, usage(__doc__, name), default=Config(), recipes=RECIPES, start=start, resume=resume)


def start(config: Config) -> str:
    """Begin a run, and return a table of its results."""
    config.check()
    images = load(config.dataset, data_dir=config.data_dir, limit_train=config.limit_train)
    config = resolve(config, small=images.name.startswith("digits"))
    if config.tb != "none":  # a baseline has no factors
        config.check()  # again: a factor that was given has to fit the other, filled in
    run = config.out / run_name(images.name.split(":")[0].split(" ")[0], config.model, config.tb)
    with at_work(run):
        write_config(run, config, facts(images))
        return train_run(run, config, images)


def resume(run: Path) -> str:
    """Go on with a run from its last checkpoints, and return a table of its results."""
    config, before = read_config(run, Config)
    with at_work(run):
        images = load(before["dataset"], data_dir=config.data_dir, limit_train=config.limit_train)
        check_same_data(images, before)
        return train_run(run, config, images)
