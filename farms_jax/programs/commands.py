"""The commands of `farms`, and how a program starts: a missing extra is one line that names it."""

import functools
import importlib
from pathlib import Path
from typing import NamedTuple, NoReturn

import farms_jax
from farms_jax._extras import from_extra
from farms_jax.programs.exits import reported, run_and_end


class Command(NamedTuple):
    """A program that `farms` runs."""

    module: str  # in `farms_jax`, with a function `main(name)` that reads the command line
    extra: str  # which the module's imports come with
    summary: str


COMMANDS = {
    "analyze": Command("diagnosis.cli", "diagnose", "measure every layer of a model: a table, HTML, CSV, JSON"),
    "compare": Command("diagnosis.cli", "diagnose", "show what moved between two checkpoints, or under a LoRA adapter"),
    "watch": Command("diagnosis.cli", "diagnose", "follow the checkpoints of a training run, with alerts"),
    "train": Command("train.cifar", "train", "train an image classifier with a learning rate for each layer"),
    "prune": Command("prune.llama", "prune", "prune a language model with a sparsity for each block"),
    "evaluate": Command("prune.evaluate", "prune", "measure a language model's perplexity and zero-shot accuracies"),
    "finetune": Command("sciml.dpot", "sciml", "fine-tune the PDE model DPOT with a learning rate for each layer"),
    "generate": Command("sciml.generate", "sciml", "make trajectories of compressible flows to fine-tune on"),
    "convert": Command("sciml.convert", "sciml", "convert a DPOT checkpoint of Torch to safetensors"),
    "completion": Command("programs.completion", "", "print the script that completes commands in bash or zsh"),
}


def run(module: str, extra: str, name: str) -> None:
    """Import a program and run it, called `name` in its messages."""
    with reported(name), from_extra(extra):
        importlib.import_module(module).main(name)


def launch(module: str, extra: str) -> NoReturn:
    """Run the program that `python -m MODULE` names, and end the process.

    A program calls it above its other imports: below them, a package that is missing would have ended in a traceback.
    """
    run_and_end(functools.partial(run, module, extra, module))


def run_command(command: str) -> None:
    """Run one of `COMMANDS`."""
    package = Path(farms_jax.__file__).parent
    # In a checkout that is not installed, `farms_jax.train` is in train/, which lies beside farms_jax/ there.
    if not (package / "train").is_dir() and (package.parent / "train").is_dir():
        farms_jax.__path__.append(str(package.parent))
    module, extra, _ = COMMANDS[command]
    run(f"farms_jax.{module}", extra, f"farms {command}")
