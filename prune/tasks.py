"""Zero-shot tasks of lm-eval: the paper's by name, or local task files.

lm = JaxLM("path/to/model")
for score in zero_shot(lm, load_tasks(PAPER_TASKS)):
    print(score.task, score.metric, score.value)
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import lm_eval.tasks
import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from farms_jax.errors import InputError, one_line

from .harness import JaxLM
from .texts import hub

PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# Their task files inside lm-eval; to read its thousands of others takes seconds.
_PAPER_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")
_SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # output types without generation
_BOOTSTRAPS = 1000  # for standard errors that have no formula; accuracies have one


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int


def load_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Task]:
    """Return tasks of lm-eval, by name, with their data; `names` may be those of groups and tags too.

    Task files (YAML) in `folder` come before lm-eval's own of the same name. Relative paths under `dataset_kwargs:
    data_files` are looked up beside the task file first. Task files can name Python functions, which are run.

    Raises:
        InputError: the folder or a task does not exist, its data cannot be loaded, or it generates text.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"--tasks-dir {folder}: no such folder; give one that holds task files (.yaml)")
    own: list[str | Path] = [] if folder is None else [folder]
    papers = [Path(lm_eval.tasks.__file__).parent / folder for folder in _PAPER_FOLDERS]
    manager = TaskManager(include_defaults=False, include_path=[*papers, *own])
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)
    if unknown := [name for name in names if name not in manager.task_index]:
        have = "" if folder is None else f"; --tasks-dir {folder} has no valid task file for it"
        raise InputError(f"--tasks {','.join(unknown)}: lm-eval has no such task{have}; `lm-eval ls tasks` lists them")
    tasks: dict[str, Task] = {}
    for name in names:
        tasks |= _load_task(manager, name)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _SCORED:
            raise InputError(f"--tasks {name}: generates text; only tasks that compare likelihoods can be evaluated")
    return tasks


def _load_task(manager: TaskManager, name: str) -> dict[str, Task]:
    entry, spec = manager.task_index[name], name
    keywords = (entry.cfg or {}).get("dataset_kwargs") or {}
    if entry.yaml_path is not None and "data_files" in keywords:
        folder = entry.yaml_path.parent

        def absolute(path: str) -> str:
            return str((folder / path).resolve()) if (folder / path).exists() else path

        found = jax.tree.map(absolute, keywords["data_files"])  # a path, or lists and dictionaries of them
        # lm-eval changes a known task only as a member of a group.
        override = {"task": name, "dataset_kwargs": {**keywords, "data_files": found}}
        spec = {"group": f"{name} with paths", "task": [override]}
    try:
        with hub.offline_where_unreachable():
            return manager.load([spec])["tasks"]
    except Exception as error:  # of lm-eval, datasets, and several network libraries
        raise InputError(
            f"--tasks {name}: cannot be loaded ({one_line(error)}); without internet give --tasks-dir FOLDER, "
            "a folder with a task file of that name whose data_files are on this machine"
        ) from error


def zero_shot(lm: JaxLM, tasks: Mapping[str, Task], limit: int | None = None) -> list[Score]:
    """Return a model's metrics in the order of the tasks; prompts have examples only if a task's file asks for some.

    `limit` is the number of examples of each task, from the first on.

    Raises:
        InputError: a continuation has no tokens or too many, or a metric is not finite.
    """
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
    # Not simple_evaluate: it seeds torch and describes it wherever it is installed.
    results: Any = evaluate(
        lm=lm, task_dict={"tasks": dict(tasks)}, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
    )
    scores = []
    for name in tasks:
        row, examples = results["results"][name], results["n-samples"][name]["effective"]
        for key in (key for key in row if "," in key and "_stderr," not in key):
            metric, kind = key.split(",", 1)
            stderr = row.get(f"{metric}_stderr,{kind}")
            if not math.isfinite(row[key]):
                raise InputError(f"--tasks {name}: {metric} is {row[key]}; take another task or model")
            known = isinstance(stderr, float) and math.isfinite(stderr)
            shown = metric if kind == "none" else f"{metric} ({kind})"
            scores.append(Score(name, shown, float(row[key]), stderr if known else None, examples))
    return scores


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean over tasks of each metric that all of them have; for the paper's seven, `acc`."""
    values: dict[str, list[float]] = {}
    for score in scores:
        values.setdefault(score.metric, []).append(score.value)
    tasks = {score.task for score in scores}
    return {metric: float(np.mean(found)) for metric, found in values.items() if len(found) == len(tasks)}
