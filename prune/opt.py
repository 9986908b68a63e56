"""Prune OPT: `prune.llama` with OPT-125M as its default model.

python -m prune.opt --sparsity 0.5 [--model PATH|HUB_ID]
"""

from prune.config import Config
from prune.llama import main

if __name__ == "__main__":
    main(Config(model="facebook/opt-125m"))
