"""Fine-tune DPOT on 2D compressible Navier-Stokes data with TB_Sigmoid and FARMS.

python -m sciml.dpot --tb farms                               generated data, pretraining, then all three settings
python -m sciml.dpot --recipe tiny-25-farms --data FILE --weights model_Ti.safetensors      a cell of Table 4
python -m sciml.dpot --resume runs/NAME                       go on with a run that was stopped
"""

from pathlib import Path

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.dpot", extra="sciml")

from farms_jax.programs.command_line import run_name, run_program, usage
from farms_jax.programs.config_file import read_config, write_config
from farms_jax.programs.run_directory import at_work

from .config import RECIPES, Config
from .preparation import complete, prepare
from .training import run_experiment


def main(name: str = "sciml.dpot") -> None:
    """Run the program, called `name` in its messages; a mistake in settings or data is one line and exit status 2."""
    run_program(name, usage(__doc__, name), default=Config(), recipes=RECIPES, start=start, resume=resume)


def start(config: Config, run: Path | None = None) -> str:
    """Begin a run, and return a table of its results; `run` is by default named after data, model and time."""
    config.check()
    experiment = prepare(complete(config))
    config = experiment.config
    name = run_name(experiment.finetune.name.removesuffix(".hdf5"), str(config.model), config.tb)
    run = run or config.out / name
    with at_work(run):
        write_config(run, config, experiment.facts())
        return run_experiment(run, experiment)


def resume(run: Path) -> str:
    """Go on with a run from its last checkpoints, and return a table of its results."""
    config, before = read_config(run, Config)
    with at_work(run):
        experiment = prepare(config)
        experiment.check_same(before)
        return run_experiment(run, experiment)
