"""Levels: every block pruned to several plans, once, from one calibration pass over the dense model.

A model with any level in any layer is then put together from them, without pruning anything again. Each block sees the
inputs of the dense model here, not those of pruned blocks before it: levels compare allocations, and are not written
into a model.
"""

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from farms_jax.errors import InputError
from farms_jax.programs.files import atomic

from .allocation import Plan
from .config import Config, Method
from .forward import Statistics, Tensors, embed, run_blocks
from .job import Job
from .models import Network
from .pruning import STATISTIC, Factors, prune_block

Choice = tuple[int | None, ...]  # the level of each linear of a block, in the order of `network.linears`; None: dense


# Methods in whose place another prunes the levels: it tells allocations apart as well, in a fraction of the time.
_STAND_INS: dict[Method, Method] = {"admm": "sparsegpt"}


def level_config(config: Config) -> Config:
    """Return the settings that levels are pruned with."""
    if config.method not in _STAND_INS:
        return config
    return dataclasses.replace(config, method=_STAND_INS[config.method], damping=None)


@dataclasses.dataclass(frozen=True)
class Levels:
    """A folder of pruned layers: of each a packed mask, and the weights it keeps where these are not the dense ones."""

    folder: Path
    network: Network

    def has(self, block: int, level: int) -> bool:
        """Tell whether a block was written at a level."""
        return self._path(block, level).exists()

    def write(self, block: int, level: int, dense: Tensors, pruned: Tensors, masks: dict[str, np.ndarray]) -> None:
        """Keep the layers of a block; tensors as stored, masks (out, in) by layer."""
        content = {}
        for layer, mask in masks.items():
            content[f"{layer}.mask"] = np.packbits(mask)
            kept = pruned[f"{layer}.weight"][mask]
            if not np.array_equal(kept, dense[f"{layer}.weight"][mask]):
                content[f"{layer}.kept"] = kept.view(np.uint8)  # bytes: npz knows no bfloat16
        with atomic(self._path(block, level)) as part, part.open("wb") as file:
            np.savez(file, **content)

    def apply(self, block: int, dense: Tensors, choice: Choice) -> Tensors:
        """Return a block's tensors with the layers that the choice names at their levels.

        Raises:
            InputError: a file is damaged or gone.
        """
        tensors, layers = dict(dense), [self.network.layer_name(block, linear) for linear in self.network.linears]
        for level in {level for level in choice if level is not None}:
            path = self._path(block, level)
            try:
                with np.load(path) as content:
                    for layer in (layer for layer, chosen in zip(layers, choice, strict=True) if chosen == level):
                        weight = dense[f"{layer}.weight"]
                        mask = np.unpackbits(content[f"{layer}.mask"], count=weight.size).astype(bool)
                        mask, zero = mask.reshape(weight.shape), np.zeros((), weight.dtype)
                        pruned = tensors[f"{layer}.weight"] = np.where(mask, weight, zero)
                        if (kept := f"{layer}.kept") in content:
                            pruned[mask] = content[kept].view(weight.dtype)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"{path} is damaged or gone ({error}); remove {self.folder}, then give the same command again"
                ) from error
        return tensors

    def _path(self, block: int, level: int) -> Path:
        return self.folder / f"block{block}-level{level}.npz"


def build_levels(job: Job, plans: Sequence[Plan], folder: Path, title: str) -> Levels:
    """Return the levels of these plans, of one method; those that are in the folder already stay as they are.

    One pass of the calibration sequences through the dense model, with one block in memory.
    """
    network, read, statistic = job.network, job.checkpoint.read, STATISTIC[plans[0].method]
    levels = Levels(folder, network)
    missing = [block for block in range(network.num_blocks) if not all(levels.has(block, n) for n in range(len(plans)))]
    if not missing:
        return levels

    def visit(block: int, tensors: Tensors, statistics: Statistics) -> None:
        factors: Factors = {}
        for level, plan in enumerate(plans):
            if not levels.has(block, level):
                pruned = prune_block(network, block, tensors, statistics, plan, factors)
                levels.write(block, level, tensors, pruned.tensors, pruned.masks)

    seen = job.seen if statistic else job.seen[:0]
    activations = embed(network, read, seen, job.config.spill)
    run_blocks(
        network,
        read,
        activations,
        title=title,
        visit=visit,
        statistic=statistic,
        calibration=len(seen),
        first=missing[0],
    )
    return levels
