"""A model under the window settings of the paper's Table 6: which sparsity every block gets."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments._common import positive
from farms_jax import block_of, natural_key
from farms_jax.errors import InputError
from prune.allocation import sparsities
from prune.config import BUNDLED, Config
from prune.job import Job
from prune.scores import score_layers

PER_AXIS = (5, 10, 15, 20)  # the paper's
_SHARES = (8, 4, 2, 1)  # the paper's 500, 1000, 2000 and 4096 rows are about so many parts of LLaMA-7B's 4096


class Setting(NamedTuple):
    """A way to allocate sparsity.

    Attributes:
        allocation: uniform, alphapruning or farms.
        rows: of a window, under farms.
        per_axis: window positions on each axis, under farms.
    """

    allocation: str
    rows: int | None = None
    per_axis: int | None = None

    def __str__(self) -> str:
        """Return a name."""
        return self.allocation if self.rows is None else f"{self.rows} rows, {self.per_axis} per axis"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the experiments on pruning."""
    parser.add_argument("--model", help="Hugging Face folder, FILE.gguf or hub id; default: the bundled small LLaMA")
    parser.add_argument(
        "--rows", nargs="+", type=positive, help="of the windows; default: parts of the least dimension"
    )
    parser.add_argument("--per-axis", nargs="+", type=positive, default=list(PER_AXIS), help="positions on each axis")
    parser.add_argument("--sparsity", type=float, default=0.6, help="fraction of the block weights to remove")
    parser.add_argument("--epsilon", type=float, default=0.3, help="half the range of sparsities")
    parser.add_argument("--tail", default="peak", choices=["median", "peak", "ks"], help="start of the tail")
    parser.add_argument("--cache", type=Path, default=Path("runs"), help="folder of earlier analyses")


def config_of(args: argparse.Namespace) -> Config:
    """Return the settings of a pruning run, on as little text as can be of those that come with the program."""
    return Config(
        model=args.model,
        sparsity=args.sparsity,
        epsilon=str(args.epsilon),
        tail=args.tail,
        calibration=str(BUNDLED / "calibration.txt"),
        text=str(BUNDLED / "heldout.txt"),
        samples=1,
        length=128,
        limit=1,
        special_tokens=False,
        out=args.cache,
    )


def grid(args: argparse.Namespace, job: Job) -> list[Setting]:
    """Return the baselines, then all windows."""
    least = min(min(shape) for shape in job.network.layer_shapes().values())
    rows = args.rows or [max(1, least // share) for share in _SHARES]
    windows = [Setting("farms", size, count) for size in rows for count in args.per_axis]
    return [Setting("uniform"), Setting("alphapruning"), *windows]


def under(job: Job, setting: Setting) -> Job:
    """Return the job with the allocation of a setting."""
    fields = {"allocation": setting.allocation, "rows": setting.rows}
    fields |= {"per_axis": setting.per_axis} if setting.per_axis else {}
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **fields))


def allocate(job: Job) -> dict[str, float]:
    """Return the sparsity of every layer under the job's allocation."""
    epsilon = job.config.half_range()
    assert epsilon is not None
    return sparsities(job.config, score_layers(job), job.network.layer_shapes(), epsilon)


def read_json(path: Path) -> dict[str, Any]:
    """Read what an earlier command left.

    Args:
        path: of its JSON file.

    Returns:
        Its content.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); remove the file, and its experiment starts anew") from error


def by_block(sparsity: dict[str, float]) -> np.ndarray:
    """Return the sparsity of every block, shape (blocks,): the layers of one share it."""
    blocks = {block_of(layer): value for layer, value in sparsity.items()}
    return np.array([blocks[block] for block in sorted(blocks, key=natural_key)])
