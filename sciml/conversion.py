"""Where each tensor of DPOT's state dict goes in our parameters, and in which layout: a table, read in both directions.

>>> place = place_of("blocks.3.mlp.2.weight")
>>> place.path, place.to_ours(np.zeros((16, 32, 1, 1))).shape
('blocks/3/mlp/fc2/kernel', (1, 1, 32, 16))
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Components of a model, by the reference's names, and the first part of their parameters' names.
_PARTS = {
    "patch_embed": ("patch_embed",),
    "pos": ("pos_embed",),
    "blocks": ("blocks",),
    "scale_feats": ("scale_mu", "scale_sigma"),
    "cls_head": ("cls_head",),
    "time_agg": ("time_agg",),
    "out": ("out_layer",),
}
COMPONENTS = tuple(_PARTS)
_COMPONENT_OF = {part: component for component, parts in _PARTS.items() for part in parts}


class Layout(NamedTuple):
    """How an array of Torch becomes ours, and back."""

    rank: int | None  # of Torch's array; None: any
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _axes(*order: int) -> Layout:
    return Layout(len(order), lambda a: a.transpose(order), lambda a: a.transpose(np.argsort(order)))


SAME = Layout(None, lambda a: a, lambda a: a)
LINEAR = _axes(1, 0)  # (out, in) <-> (in, out)
CONV = _axes(2, 3, 1, 0)  # (out, in, rows, cols) <-> (rows, cols, in, out)
DECONV = _axes(2, 3, 0, 1)  # (in, out, rows, cols) <-> (rows, cols, in, out)
POSITIONS = Layout(4, lambda a: a[0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[None])  # (1, C, h, w)
ROW = Layout(2, lambda a: a[0], lambda a: a[None])  # (1, C) <-> (C,)


class Row(NamedTuple):
    """One line of the table, where {} stands for the number of a block; or the same of one tensor, number and all."""

    name: str  # in Torch's state dict
    path: str  # in our parameters
    layout: Layout

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Returns Torch's array in our layout; one of a rank that does not fit stays as it is."""
        return array if self.layout.rank not in {None, array.ndim} else self.layout.to_ours(array)


_WEIGHTS = (
    Row("patch_embed.proj.0.weight", "patch_embed/patches/kernel", CONV),
    Row("patch_embed.proj.2.weight", "patch_embed/proj/kernel", CONV),
    Row("blocks.{}.norm1.weight", "blocks/{}/norm1/scale", SAME),
    Row("blocks.{}.norm2.weight", "blocks/{}/norm2/scale", SAME),
    Row("blocks.{}.mlp.0.weight", "blocks/{}/mlp/fc1/kernel", CONV),
    Row("blocks.{}.mlp.2.weight", "blocks/{}/mlp/fc2/kernel", CONV),
    Row("scale_feats_mu.weight", "scale_mu/kernel", LINEAR),
    Row("scale_feats_sigma.weight", "scale_sigma/kernel", LINEAR),
    Row("cls_head.0.weight", "cls_head/fc1/kernel", LINEAR),
    Row("cls_head.2.weight", "cls_head/fc2/kernel", LINEAR),
    Row("cls_head.4.weight", "cls_head/fc3/kernel", LINEAR),
    Row("out_layer.0.weight", "out_layer/deconv/kernel", DECONV),
    Row("out_layer.2.weight", "out_layer/conv1/kernel", CONV),
    Row("out_layer.4.weight", "out_layer/conv2/kernel", CONV),
)
TABLE = (
    Row("pos_embed", "pos_embed", POSITIONS),
    Row("time_agg_layer.w", "time_agg/w", SAME),
    Row("time_agg_layer.gamma", "time_agg/gamma", ROW),
    Row("blocks.{}.filter.w1", "blocks/{}/filter/w1", SAME),
    Row("blocks.{}.filter.b1", "blocks/{}/filter/b1", SAME),
    Row("blocks.{}.filter.w2", "blocks/{}/filter/w2", SAME),
    Row("blocks.{}.filter.b2", "blocks/{}/filter/b2", SAME),
    *_WEIGHTS,
    # Every one of those has a bias.
    *(Row(name.replace("weight", "bias"), re.sub(r"\w+$", "bias", path), SAME) for name, path, _ in _WEIGHTS),
)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(0|[1-9]\d*)"))


_BY_NAME = tuple((_pattern(row.name), row) for row in TABLE)
_BY_PATH = tuple((_pattern(row.path), row) for row in TABLE)


def place_of(name: str) -> Row | None:
    """Returns the place of a tensor with this name in Torch's state dict; None for an unknown one."""
    return _find(name, _BY_NAME)


def place_of_path(path: str) -> Row | None:
    """Returns the place of a parameter of ours; None for an unknown one."""
    return _find(path, _BY_PATH)


def _find(text: str, rules: tuple[tuple[re.Pattern[str], Row], ...]) -> Row | None:
    found = [(match, row) for pattern, row in rules if (match := pattern.fullmatch(text))]
    if not found:
        return None
    [(match, row)] = found  # no two rows fit the same name
    return Row(row.name.format(*match.groups()), row.path.format(*match.groups()), row.layout)


def component_of(path: str) -> str:
    """Returns which of COMPONENTS a parameter, by our name, belongs to."""
    return _COMPONENT_OF[path.partition("/")[0]]
