"""The model card of a pruned model, `README.md` in its folder: what was done, what it cost, how to use it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farms_jax.programs.files import write_text

from .command import command_line
from .config import Config
from .results import ZEROS, perplexity_rows

CARD = "README.md"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?")
_DOWNLOADED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder in the cache of huggingface_hub
_METHODS = {
    "wanda": "[Wanda](https://arxiv.org/abs/2306.11695)",
    "wanda_variant": "[Wanda](https://arxiv.org/abs/2306.11695), the variant with rows of different sparsities",
    "sparsegpt": "[SparseGPT](https://arxiv.org/abs/2301.00774)",
    "admm": "[ADMM](https://arxiv.org/abs/2401.02938)",
}


def write_model_card(folder: Path, config: Config, run: Mapping[str, Any]) -> None:
    """Write the card into a model's folder unless there is one, which may have been edited since.

    Args:
        folder: of the model.
        config: resolved settings.
        run: content of `run.json`.
    """
    if not (folder / CARD).exists():
        write_text(folder / CARD, model_card(config, run))


def model_card(config: Config, run: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with the fields that the hub reads at its head; arguments as `write_model_card`."""
    settings, evaluation, base = run["settings"], run["evaluation"], _base_model(config.model)
    dtype, reached, name = run["dtype"]["written"], f"{run['sparsity']['reached']:.2%}", run["model"]["name"]
    what = f"[{base}](https://huggingface.co/{base})" if base else name
    pattern = f" in groups of {settings['groups']}" if settings["groups"] else ""
    rows = [
        f"| {row.allocation} | {row.sparsity:.4f} | {row.perplexity:.4f} | {row.low:.2f} to {row.high:.2f} |"
        for row in perplexity_rows(run)
    ]
    lines = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in _tags(settings)),
        "---",
        "",
        f"# {name}, pruned to {reached}",
        "",
        f"{what} with {reached} of the weights of its blocks removed{pattern}, by "
        f"{_METHODS.get(settings['method'], settings['method'])} with the allocation `{settings['allocation']}`, in "
        f"{dtype}. Embeddings, norms and the head are those of the dense model, and so are licence and limits.",
        f"Calibration: {settings['samples']} sequences of {settings['length']} tokens of "
        f"{Path(settings['calibration']).name}.",
        "",
        "## Perplexity",
        "",
        f"On {Path(evaluation['source']).name}, {evaluation['count']} blocks of {evaluation['length']} tokens, of the "
        "weights as they are here; the last line is this model. Intervals are of 95 %, by a bootstrap over the blocks.",
        "",
        "| allocation | sparsity | perplexity | interval |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")  # this folder, or its name on the hub',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        ZEROS,
        "",
        "## Reproduce",
        "",
        "```bash",
        command_line(config, short=True),
        "```",
        "",
        f"farms-jax {run['versions']['farms-jax']}, JAX {run['versions']['jax']}. "
        f"SHA-256 of the dense model's tensors: {run['model']['tensors_sha256']}.",
        "",
    ]
    return "\n".join(lines)


def _tags(settings: Mapping[str, Any]) -> list[str]:
    groups = [settings["groups"]] if settings["groups"] else []
    return ["pruning", "sparse", "farms-jax", settings["method"], settings["allocation"], *groups]


def _base_model(model: str | None) -> str | None:
    """Return the hub's name of a model, where its source tells one."""
    if model is None:
        return None
    path = Path(model).expanduser()
    if path.exists():
        return next(("/".join(found.groups()) for part in path.parts if (found := _DOWNLOADED.fullmatch(part))), None)
    found = _HUB_ID.fullmatch(model)
    return found[1] if found else None
