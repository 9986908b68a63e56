"""Axes of charts in SVG: scales, ticks, frames. Colours are those of the page's style sheet, by class."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

Ticks = Sequence[tuple[float, str]]


class Scale(NamedTuple):
    """Numbers `low` to `high` on pixels `start` to `end`; what lies beyond is put on the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a number, to a tenth; an `int` where it is whole, which is shorter to write.

        >>> Scale(0, 10, 100, 200)(2.5), Scale(0, 10, 100, 200)(11), Scale(0, 10, 100, 200)(3.333)
        (125, 200, 133.3)
        """
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1)
        pixel = round(self.start + share * (self.end - self.start), 1)
        return int(pixel) if pixel == int(pixel) else pixel

    def holds(self, value: float) -> bool:
        """Whether a number lies on the axis."""
        return self.low <= value <= self.high


def ticks(low: float, high: float, count: int = 6) -> list[tuple[float, str]]:
    """Choose round numbers in a range.

    >>> ticks(1.4, 2.3, 4)
    [(1.5, '1.5'), (2.0, '2.0')]

    Args:
        low: end of the axis.
        high: end of the axis.
        count: about how many.

    Returns:
        Numbers and labels.
    """
    if not high > low:
        return [(low, f"{low:.3g}")]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(round(i * step, 10), f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def decades(low: float, high: float, count: int = 7) -> list[tuple[float, str]]:
    """Choose powers of ten on an axis of log10.

    Args:
        low: end of the axis.
        high: end of the axis.
        count: at most about how many.

    Returns:
        Exponents and labels.
    """
    exponents = range(math.ceil(low), math.floor(high) + 1)
    every = max(1, math.ceil(len(exponents) / count))
    return [(e, f"{10.0**e:g}") for e in exponents if e % every == 0]


def frame(x: Scale, y: Scale, x_ticks: Ticks, y_ticks: Ticks, x_label: str = "", y_label: str = "") -> str:
    """Draw grid, ticks and labels of a chart.

    Args:
        x: horizontal scale.
        y: vertical scale; `start` is the bottom.
        x_ticks: numbers and labels.
        y_ticks: numbers and labels.
        x_label: what the horizontal axis is.
        y_label: what the vertical axis is.

    Returns:
        SVG elements.
    """
    grid = "".join(f"M{x.start} {y(value)}H{x.end}" for value, _ in y_ticks)
    grid += "".join(f"M{x(value)} {y.start}v4" for value, _ in x_ticks)
    left = "".join(f'<text x="{x.start - 6}" y="{round(y(v)) + 4}">{escape(t)}</text>' for v, t in y_ticks)
    below = "".join(f'<text x="{x(v)}" y="{y.start + 17}">{escape(t)}</text>' for v, t in x_ticks)
    middle, height = (x.start + x.end) / 2, (y.start + y.end) / 2
    if x_label:
        below += f'<text x="{middle:g}" y="{y.start + 35}">{escape(x_label)}</text>'
    if y_label:
        below += f'<text transform="translate(12 {height:g}) rotate(-90)">{escape(y_label)}</text>'
    lines = f'<path class="grid" d="{grid}"/><path class="axis" d="M{x.start} {y.start}H{x.end}"/>'
    return f'{lines}<g class="left">{left}</g><g class="below">{below}</g>'


def drawing(width: int, height: int, title: str, content: Iterable[str]) -> str:
    """Put a chart together.

    Args:
        width: in pixels of the drawing, which scales with the page.
        height: likewise.
        title: what a screen reader says.
        content: SVG elements, the last in front.

    Returns:
        The `svg` element.
    """
    label = escape(title)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(content)}</svg>'


def steps(x: Scale, y: Scale, edges: Sequence[float], heights: Sequence[float | None], *, close: bool) -> str:
    """Draw a histogram's outline in whole pixels, relative to one another: thousands of them fit one page.

    Args:
        x: horizontal scale.
        y: vertical scale.
        edges: of the bins, B + 1.
        heights: of the bins, B; `None` for an empty one, which stands on the axis.
        close: down to the axis at both ends, to be filled.

    Returns:
        The `d` of a path; empty where all bins are.
    """
    filled = [i for i, height in enumerate(heights) if height is not None]
    if not filled:
        return ""
    first, last = filled[0], filled[-1] + 1
    floor = round(y.start)
    path, level = f"M{round(x(edges[first]))} {floor}", floor
    for i in range(first, last):
        height = heights[i]
        new = floor if height is None else round(y(height))
        if new != level:
            path += f"H{round(x(edges[i]))}v{new - level}"
            level = new
    return path + f"H{round(x(edges[last]))}V{floor}" + ("Z" if close else "")
