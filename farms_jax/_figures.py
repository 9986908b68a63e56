"""An empty Matplotlib figure in the style of every plot here; imported only where something is drawn."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE = (10.0, 4.2)  # inches


def figure(
    title: str, columns: int, *, epochs: bool = True, size: tuple[float, float] = SIZE
) -> tuple[Figure, Sequence[Any]]:
    """Make an empty figure.

    Args:
        title: above all columns.
        columns: plots side by side.
        epochs: along the horizontal axes, ticked at whole numbers.
        size: width and height in inches.

    Returns:
        The figure and its axes, with grids.
    """
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        if epochs:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes
