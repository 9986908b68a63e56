"""An empty Matplotlib figure in the style of every plot here; imported only where something is drawn."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from farms_jax._present import common_prefix, shorten

SIZE = (10.0, 4.2)  # inches
NAMED_TICKS = 60  # layers whose names still fit under a figure


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself.

    IPython knows how to show a `Figure` only after `%matplotlib inline` or an import of pyplot, which plots that are
    returned as values do not need otherwise.
    """

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def figure(
    title: str, columns: int, *, epochs: bool = True, size: tuple[float, float] = SIZE
) -> tuple[Figure, Sequence[Any]]:
    """Return an empty figure and its `columns` axes side by side, with grids.

    `epochs` ticks the horizontal axes at whole numbers; `size` is width and height in inches.
    """
    figure = NotebookFigure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        if epochs:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def name_layers(axis: Any, names: Sequence[str]) -> None:
    """Name the layers under axes where they stand at 0, 1, 2, ...; where they are many, numbers remain."""
    axis.margins(x=0.02)
    if len(names) > NAMED_TICKS:
        axis.set_xlabel("layer, in network order")
        return
    prefix = common_prefix(names)
    labels = [shorten(name[len(prefix) :], 30) for name in names]
    upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    axis.set_xticks(range(len(names)), labels, fontsize="small", **upright)
    axis.set_xlabel(f"layer of {prefix[:-1]}" if prefix else "layer")
