"""Prune a large language model, block by block, with a sparsity for each block from its weight spectrum.

python -m prune.llama --sparsity 0.75                    the small LLaMA that comes with the program
python -m prune.llama --model PATH|HUB_ID|FILE.gguf      any LLaMA, Mistral, Qwen2, Qwen3 or OPT
python -m prune.llama --method sparsegpt --groups 2:4    other methods and patterns

A run that was stopped, in whatever way, goes on when the same command is given again.
"""

import tyro
from threadpoolctl import threadpool_limits

from farms_jax.programs.exits import reported, run_and_end

from .config import Config
from .job import prepare
from .run import run


def main(default: Config | None = None) -> None:
    """Run the program; a mistake in settings, model or text is one line on stderr, and exit status 2.

    Args:
        default: settings where the command line gives none.
    """
    usage = "\n\n".join(filter(None, (__doc__ or "").splitlines()))
    config = tyro.cli(Config, default=default or Config(), prog="prune.llama", description=usage)
    # BLAS threads and XLA's own slow each other down many times over.
    with reported("prune.llama", "; the same command goes on from here"), threadpool_limits(1, user_api="blas"):
        print(run(prepare(config)))


if __name__ == "__main__":
    run_and_end(main)
