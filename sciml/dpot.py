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
from .fine_tuning import run_experiment
from .preparation import complete, prepare


def main(name: str = "sciml.dpot") -> None:
    """Run the program; a mistake in settings or data is one line on stderr, and exit status 2.

    Args:
        name: What the program is called in its messages.
    """
    run_program(name, usage(__doc__, name), default=Config(), recipes=RECIPES, start=start, resume=resume)


def start(config: Config, run: Path | None = None) -> str:
    """Begin a run.

    Args:
        config: settings of the run.
        run: run directory; by default one in `config.out`, named after the data, the model and the time.

    Returns:
        A table of the results.

    Raises:
        InputError: a setting is out of its range, weights or data cannot be used, or a loss is not finite.
    """
    config.check()
    experiment = prepare(complete(config))
    config = experiment.config
    name = run_name(experiment.finetune.name.removesuffix(".hdf5"), str(config.model), config.tb)
    run = run or config.out / name
    with at_work(run):
        write_config(run, config, experiment.facts())
        return run_experiment(run, experiment)


def resume(run: Path) -> str:
    """Go on with a run from its last checkpoints.

    Args:
        run: run directory.

    Returns:
        A table of the results.

    Raises:
        InputError: there is no run, another process is at work in it, data or weights are not the same any more, all
            checkpoints are damaged, or a loss is not finite.
    """
    config, before = read_config(run, Config)
    with at_work(run):
        experiment = prepare(config)
        experiment.check_same(before)
        return run_experiment(run, experiment)
