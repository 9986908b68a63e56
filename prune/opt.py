"""Prune OPT: `prune.llama` with OPT-125M as its default model.

python -m prune.opt --sparsity 0.5 [--model PATH|HUB_ID]
"""

import functools

from farms_jax.programs.exits import run_and_end

from .config import Config
from .llama import main

if __name__ == "__main__":
    run_and_end(functools.partial(main, Config(model="facebook/opt-125m")))
