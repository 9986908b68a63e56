"""Orbax checkpoints: one tree of arrays, several under names, or numbered steps of which the newest counts."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from farms_jax._axes import FLAX_AXES
from farms_jax.errors import InputError
from farms_jax.weights.orbax_tree import DATABASE, TABLE, Array, read_array, read_tree
from farms_jax.weights.source import WeightSource

_CHECKPOINT = "_CHECKPOINT_METADATA"  # marks the folder of a checkpoint
_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:.*[_.-])?(\d+)")


class OrbaxSource(WeightSource):
    """Weights in an Orbax checkpoint."""

    def __init__(self, path: Path, name: str, trees: Mapping[str, Path]) -> None:
        """Find the arrays of trees, given as name -> folder; where there are several, names of arrays begin with it."""
        self._arrays: dict[str, tuple[Path, Array]] = {}
        for tree, folder in trees.items():
            start = f"{tree}/" if len(trees) > 1 else ""
            for leaf, array in read_tree(folder).items():
                # An NNX variable is saved with its array one level below it.
                self._arrays[f"{start}{leaf.removesuffix('/value')}"] = folder, array
        super().__init__(path, name, "orbax", FLAX_AXES, {leaf: a.info for leaf, (_, a) in self._arrays.items()})

    def _read(self, name: str) -> np.ndarray:
        folder, array = self._arrays[name]
        return read_array(folder, name, array)


def open_orbax(path: Path) -> OrbaxSource | None:
    """Open a tree, a checkpoint of trees, or the newest in a folder of numbered ones; `None` for any other path."""
    if found := trees(path):
        return OrbaxSource(path, path.resolve().name, found)
    if found := steps(path):
        newest = found[-1]
        return OrbaxSource(newest, f"{path.resolve().name}, step {newest.name}", trees(newest))
    if any((path / file).is_file() for file in (_CHECKPOINT, DATABASE)):
        raise InputError(
            f"{path}: an Orbax checkpoint without {TABLE}: not finished, damaged, or of no arrays; give another step"
        )
    return None


def trees(folder: Path) -> dict[str, Path]:
    """Return the trees of a checkpoint, name -> folder; a folder that is itself a tree has the name ""."""
    if (folder / TABLE).is_file():
        return {"": folder}
    if not (folder / _CHECKPOINT).is_file():
        return {}
    return {child.name: child for child in _folders(folder) if (child / TABLE).is_file()}


def steps(folder: Path) -> list[Path]:
    """Return a folder's checkpoints whose names end in a number, such as `300` or `step_300`, in numerical order."""
    numbered = [(int(match[1]), child) for child in _folders(folder) if (match := _STEP.fullmatch(child.name))]
    return [child for _, child in sorted(numbered) if trees(child)]


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and _UNFINISHED not in child.name]
