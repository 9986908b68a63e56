"""Prune a large language model, block by block, with a sparsity for each block from its weight spectrum.

python -m prune.llama --sparsity 0.75                    the small LLaMA that comes with the program
python -m prune.llama --model PATH|HUB_ID|FILE.gguf      LLaMA, Mistral, Qwen, Phi-3, Gemma, OLMo 2, Pythia, GPT-2, ...
python -m prune.llama --method sparsegpt --groups 2:4    other methods and patterns
python -m prune.llama --method admm --recover blocks     the most accurate: what stays is trained, block by block

A run that was stopped, in whatever way, goes on when the same command is given again.
"""

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.llama", extra="prune")

import tyro
from threadpoolctl import threadpool_limits

from farms_jax.programs.command_line import usage
from farms_jax.programs.exits import reported

from .config import Config
from .job import prepare
from .run import run


def main(name: str = "prune.llama") -> None:
    """Run the program, called `name` in its messages; a mistake is one line on stderr, and exit status 2."""
    config = tyro.cli(Config, prog=name, description=usage(__doc__, name))
    # BLAS threads and XLA's own slow each other down many times over.
    with reported(name, "; the same command goes on from here"), threadpool_limits(1, user_api="blas"):
        print(run(prepare(config)))
