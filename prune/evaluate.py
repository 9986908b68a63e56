"""Evaluate a language model, dense or pruned: perplexity on a text, and zero-shot tasks.

python -m prune.evaluate MODEL --text wikitext2                   perplexity as the pruning papers measure it
python -m prune.evaluate MODEL --tasks paper                      their seven zero-shot tasks (needs lm-eval)
python -m prune.evaluate MODEL --tasks mine --tasks-dir FOLDER    tasks from files on this machine
"""

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.evaluate", extra="prune")

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from farms_jax._extras import from_extra
from farms_jax.errors import InputError
from farms_jax.programs.command_line import usage
from farms_jax.programs.environment import installed_versions
from farms_jax.programs.exits import reported
from farms_jax.programs.files import write_json

from .checkpoints import Checkpoint, choose_tokenizer, open_checkpoint
from .perplexity import perplexity
from .texts import are_token_ids, evaluation_blocks, tokenizer_fingerprint

_LENGTH = 2048  # the papers' blocks
_PACKAGES = ("farms-jax", "jax", "numpy", "transformers", "tokenizers", "datasets", "lm-eval")


@dataclasses.dataclass(frozen=True)
class Config:
    """One evaluation."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder, GGUF file, or hub name OWNER/NAME."""
    tasks: str | None = None
    """Names of lm-eval tasks with commas between; paper: boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge,
    openbookqa."""
    tasks_dir: Path | None = None
    """Folder with task files (YAML) of your own. They may name Python functions, which are run."""
    limit: int | None = None
    """Number of examples of each task, and of blocks of the text, to evaluate."""
    text: str | None = None
    """Text for the perplexity: wikitext2, c4, or a file: text, or documents under "text" in json, jsonl, csv, parquet
    or arrow (also .gz, .bz2, .xz, .zst), or token ids in npy or npz."""
    length: int | None = None
    """Tokens in a block of the text. Default: 2048, or what the model has positions for."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer, where it is not the model's own."""
    special_tokens: bool = True
    """Let the tokenizer add those that it adds by default, such as a first BOS."""
    batch_tokens: int = 4096
    """Tokens of the tasks that go through the network at a time."""
    stream_tokens: int | None = None
    """Tokens of the tasks after which the model is read anew, block by block, instead of being held in memory."""
    json: Path | None = None
    """Write the results, and all that they depend on, as JSON."""

    def check(self) -> None:
        """Raise an InputError that names the flag where a value is out of its range."""
        for field in ("limit", "batch_tokens", "stream_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"--{field.replace('_', '-')} must be above 0, got {value}")
        if self.length is not None and self.length < 2:
            raise InputError(f"--length must be above 1, got {self.length}")
        if self.tasks is None and self.text is None:
            raise InputError("nothing to evaluate; give --text SOURCE, --tasks NAMES, or both")
        if self.tasks is not None and not self.task_names():
            raise InputError("--tasks is empty; give names with commas between, or paper")
        if self.json is not None:
            # The file's folder, or the nearest that exists above it.
            folder = next(path for path in self.json.absolute().parents if path.exists())
            if self.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
                raise InputError(
                    f"--json {self.json}: is a folder, or in one that cannot be written to; give another file"
                )

    def task_names(self) -> list[str]:
        """Return the names in `--tasks`."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


def main(name: str = "prune.evaluate") -> None:
    """Run the program, called `name` in its messages; a mistake is one line on stderr, and exit status 2."""
    config = tyro.cli(Config, prog=name, description=usage(__doc__, name))
    with reported(name):
        result = run(config)
        print(table(result))
        if config.json is not None:
            write_json(config.json, result)
            print(f"written to {config.json}")


def run(config: Config) -> dict[str, Any]:
    """Return the perplexity and the scores of tasks that were asked for, and all that they depend on; JSON-ready.

    Raises:
        InputError: a setting, the model, the text or a task cannot be used; found before anything is computed.
    """
    config.check()
    checkpoint = open_checkpoint(config.model)
    network = checkpoint.network()
    needed = config.tasks is not None or not are_token_ids(config.text or "")
    tokenizer = choose_tokenizer(checkpoint, config.tokenizer, needed=needed)
    samples = None
    if config.text is not None:
        length = min(_LENGTH, network.max_length) if config.length is None else config.length
        if length > network.max_length:
            raise InputError(
                f"--length {length}: the model has positions for {network.max_length} tokens; give no more"
            )
        common = {"special_tokens": config.special_tokens, "vocab_size": network.vocab_size}
        samples = evaluation_blocks(config.text, tokenizer, length=length, limit=config.limit, **common)
    score_tasks = None if config.tasks is None else _load_tasks(config, checkpoint, tokenizer)
    result: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "model": checkpoint.name,
        "weights_sha256": checkpoint.sha256(),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "versions": {"python": platform.python_version()} | installed_versions(*_PACKAGES),
    }
    if samples is not None:
        found = perplexity(network, checkpoint, samples.ids)
        numbers = {"value": found.value, "seconds": found.seconds, "nll": found.nll}
        result["perplexity"] = {**numbers, **samples.record}
    if score_tasks is not None:
        result["tasks"] = score_tasks()
    return result


def _load_tasks(config: Config, checkpoint: Checkpoint, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """Load the tasks; return the function that loads the model, scores it on them, and returns a JSON-ready result."""
    with from_extra("lm-eval", "--tasks"):
        from . import harness, tasks
    # It warns of defaults that its own task files leave out.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [task for name in config.task_names() for task in (tasks.PAPER_TASKS if name == "paper" else [name])]
    loaded = tasks.load_tasks(list(dict.fromkeys(names)), config.tasks_dir)

    def score() -> dict[str, Any]:
        start = time.perf_counter()
        lm = harness.JaxLM(
            checkpoint,
            tokenizer=tokenizer,
            batch_tokens=config.batch_tokens,
            stream_tokens=config.stream_tokens,
            special_tokens=config.special_tokens,
        )
        scores = tasks.zero_shot(lm, loaded, config.limit)
        return {
            "scores": [score._asdict() for score in scores],
            "mean": tasks.means(scores),
            "seconds": time.perf_counter() - start,
        }

    return score


def table(result: dict[str, Any]) -> str:
    """Return the result of `run` as lines of text."""
    lines = []
    if "perplexity" in result:
        found = result["perplexity"]
        blocks = f"({found['count']} blocks of {found['length']} tokens)"
        lines += [f"perplexity of {found['source']}: {found['value']:.4f}   {blocks}"]
    if "tasks" in result:
        rows = [("task", "metric", "   value", "  stderr")]
        for score in result["tasks"]["scores"]:
            stderr = "" if score["stderr"] is None else f"{score['stderr']:8.4f}"
            rows.append((score["task"], score["metric"], f"{score['value']:8.4f}", stderr))
        rows += [("mean", metric, f"{value:8.4f}", "") for metric, value in result["tasks"]["mean"].items()]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines += [f"{t:<{widths[0]}}  {m:<{widths[1]}}  {v}  {e}".rstrip() for t, m, v, e in rows]
    return "\n".join(lines)
