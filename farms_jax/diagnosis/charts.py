"""Charts of the HTML page, drawn as SVG: alphas by depth, their histogram, aspect-ratio bias, one layer's spectrum."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from farms_jax.diagnosis.columns import BY_NAME
from farms_jax.diagnosis.summary import GOOD, SEVERITY
from farms_jax.diagnosis.svg import Scale, decades, drawing, frame, steps, ticks
from farms_jax.diagnosis.table import Row, half_width, number, with_interval

if TYPE_CHECKING:
    from farms_jax.diagnosis.diagnosis import Histogram

_WIDE, _NARROW = (1180, 330), (580, 300)  # pixels: width and height of a chart on its own, and of one of two
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 12, 12, 44
_SMALL = (420, 200)
_FENCE = 3.0  # quartile distances beyond the quartiles: points farther out do not stretch the axis (Tukey's "far out")
_MANY = 300  # layers, beyond which marks are smaller
_MARGIN = 0.06  # of the range, free at both ends of an axis


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Choose the ends of an axis so that single far points do not flatten all others.

    >>> limits([2.0, 2.0]), limits([1.0, 2.0, 3.0, 4.0, 1000.0])[1] < 11
    ((1.5, 2.5), True)

    Args:
        values: to be shown, at least one.

    Returns:
        The lower and the upper end.
    """
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    reach = _FENCE * (high - low)
    low, high = (max(ordered[0], low - reach), min(ordered[-1], high + reach)) if reach else (ordered[0], ordered[-1])
    room = _MARGIN * (high - low) or 0.5
    return low - room, high + room


def alphas_by_depth(rows: Sequence[Row]) -> str:
    """Draw `alpha` with its intervals, `whole_alpha` and the noise level of every layer.

    Args:
        rows: one per layer, in network order.

    Returns:
        SVG; empty where no layer has a tail. A point links to its layer's row.
    """
    shown = [(i, row) for i, row in enumerate(rows) if number(row, "alpha") is not None]
    if not shown:
        return ""
    low, high = alpha_limits(rows)
    x, y = _scales(_WIDE, (-0.5, len(rows) - 0.5), (low, high))
    numbers = [(round(at) - 1, label) for at, label in ticks(1, max(2, len(rows)), 12) if at == round(at)]
    parts = [frame(x, y, numbers, ticks(low, high), "layer, in network order", "alpha")]
    wholes = [(x(i), y(whole)) for i, row in enumerate(rows) if (whole := number(row, "whole_alpha"))]
    r = 3 if len(rows) <= _MANY else 2
    circles = "".join(f"M{a - r:g} {b}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 -{2 * r} 0" for a, b in wholes)
    parts.append(f'<path class="whole" d="{circles}"/>')
    noise = [(x(i), y(level)) for i, row in enumerate(rows) if (level := number(row, "noise_alpha"))]
    if noise:
        line = "".join(f"L{a} {b}" for a, b in noise)
        parts.append(f'<path class="noise" d="M{x.start} {noise[0][1]}{line}H{x.end}"/>')
    for i, row in shown:
        if half_width(row):
            place = _place(row.get("status"))
            parts.append(f'<path class="s{place} bar" d="M{x(i)} {y(row["alpha_low"])}V{y(row["alpha_high"])}"/>')
    parts += _linked([(i, row, x(i), y(row["alpha"])) for i, row in shown], len(rows))
    return drawing(*_WIDE, "alpha of every layer with its interval, that of the whole matrix, and that of noise", parts)


def alpha_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Choose the ends of an axis for the alphas of windows, of whole matrices and of noise.

    Args:
        rows: one per layer; at least one has an alpha.

    Returns:
        The lower and the upper end. Each kind's far points are cut off by themselves (see `limits`).
    """
    kinds = (("alpha", "alpha_low", "alpha_high"), ("whole_alpha",), ("noise_alpha",))
    found = [[v for row in rows for name in names if (v := number(row, name)) is not None] for names in kinds]
    ends = [limits(values) for values in found if values]
    return min(low for low, _ in ends), max(high for _, high in ends)


def beyond(rows: Sequence[Row]) -> int:
    """Count the alphas that the axis of `alphas_by_depth` does not reach: they stand on its edge."""
    alphas = [v for row in rows for name in ("alpha", "whole_alpha") if (v := number(row, name)) is not None]
    low, high = alpha_limits(rows) if alphas else (0.0, 0.0)
    return sum(not low <= alpha <= high for alpha in alphas)


def alpha_histogram(rows: Sequence[Row]) -> str:
    """Draw how many layers have which `alpha` and `whole_alpha`.

    Args:
        rows: one per layer.

    Returns:
        SVG; empty where no layer has a tail.
    """
    names = ("alpha", "whole_alpha")
    values = {name: [v for row in rows if (v := number(row, name)) is not None] for name in names}
    if not values["alpha"]:
        return ""
    levels = sorted(level for row in rows if (level := number(row, "noise_alpha")) is not None)
    low, high = alpha_limits(rows)
    bins = min(40, max(12, round(2 * len(rows) ** 0.5)))  # few layers in many bins are no histogram
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    counts = {name: _counted(found, low, high, bins) for name, found in values.items()}
    x, y = _scales(_NARROW, (low, high), (0, 1.08 * max(count or 0 for found in counts.values() for count in found)))
    whole_numbers = [(v, f"{v:.0f}") for v, _ in ticks(0, y.high, 5) if v == round(v)]
    parts = [frame(x, y, ticks(low, high), whole_numbers, "alpha", "layers")]
    parts.append(f'<path class="fill" d="{steps(x, y, edges, counts["alpha"], close=True)}"/>')
    parts.append(f'<path class="whole" d="{steps(x, y, edges, counts["whole_alpha"], close=False)}"/>')
    if levels:
        parts.append(f'<path class="noise" d="M{x(levels[len(levels) // 2])} {y.start}V{y.end}"/>')
    return drawing(*_NARROW, "histogram of the layers' alphas, by windows and by whole matrices", parts)


def bias_by_aspect_ratio(rows: Sequence[Row]) -> str:
    """Draw `aspect_ratio_bias` against `Q`.

    Args:
        rows: one per layer.

    Returns:
        SVG; empty where the bias was not measured.
    """
    shown = [
        (i, row, math.log2(ratio), row["aspect_ratio_bias"])
        for i, row in enumerate(rows)
        if (ratio := number(row, "Q")) and number(row, "alpha") and number(row, "whole_alpha")
    ]
    if not shown:
        return ""
    low, high = limits([0.0, *(bias for *_, bias in shown)])
    right = max(1.0, *(ratio for _, _, ratio, _ in shown)) if len(shown) > 1 else max(1.0, shown[0][2])
    x, y = _scales(_NARROW, (-0.15, right * 1.05), (low, high))
    doublings = [(e, f"{2**e}") for e in range(0, math.floor(right) + 1, 1 + math.floor(right) // 8)]
    parts = [frame(x, y, doublings, ticks(low, high, 5), "aspect ratio Q", "alpha of whole - of windows")]
    parts.append(f'<path class="axis" d="M{x.start} {y(0)}H{x.end}"/>')
    parts += _linked([(i, row, x(ratio), y(bias)) for i, row, ratio, bias in shown], len(rows))
    return drawing(*_NARROW, "aspect-ratio bias of the whole matrix's alpha against the aspect ratio", parts)


def spectrum(row: Row, histogram: "Histogram") -> str:
    """Draw one layer's spectrum on logarithmic axes: windows, whole matrix, the tail's start and its fitted slope.

    Args:
        row: the layer's.
        histogram: its spectra.

    Returns:
        SVG; empty where no bin is filled.
    """
    heights = [math.log10(v) for v in (*histogram.windows, *histogram.whole) if v > 0]
    if not heights:
        return ""
    width, height = _SMALL
    x = Scale(histogram.edges[0], histogram.edges[-1], _LEFT, width - 8)
    y = Scale(min(heights) - 0.15, max(heights) + 0.1, height - 38, 8)
    parts = [frame(x, y, decades(x.low, x.high, 6), decades(y.low, y.high, 4), "eigenvalue", "density")]
    for name, values, close in (("fill", histogram.windows, True), ("whole", histogram.whole, False)):
        logs = [math.log10(v) if v > 0 else None for v in values]
        parts.append(f'<path class="{name}" d="{steps(x, y, histogram.edges, logs, close=close)}"/>' if logs else "")
    parts.append(_tail(row, histogram, x, y))
    return drawing(width, height, f"spectrum of {row['layer']}", parts)


def tail_line(row: Row, histogram: "Histogram") -> tuple[float, float, float, float] | None:
    """Fitted power law on logarithmic axes, scaled to the share of the windows' eigenvalues beyond `xmin`.

    A density x^-alpha is x^(1 - alpha) over log10(x).

    Args:
        row: the layer's.
        histogram: its spectra.

    Returns:
        log10 of eigenvalue and density where the tail starts, and where the spectrum ends; `None` without a tail.
    """
    alpha, xmin = number(row, "alpha"), number(row, "xmin")
    if alpha is None or not xmin or alpha <= 1:
        return None
    edges, width, start = histogram.edges, histogram.edges[1] - histogram.edges[0], math.log10(xmin)
    inside = ((value, min(width, right - start)) for value, right in zip(histogram.windows, edges[1:], strict=True))
    share = sum(value * part for value, part in inside if part > 0)
    filled = [right for value, right in zip(histogram.windows, edges[1:], strict=True) if value > 0 and right > start]
    if not filled or share <= 0:
        return None
    top = math.log10(math.log(10) * share * (alpha - 1))
    return start, top, filled[-1], top - (alpha - 1) * (filled[-1] - start)


def _tail(row: Row, histogram: "Histogram", x: Scale, y: Scale) -> str:
    line = tail_line(row, histogram)
    if line is None or not x.holds(line[0]):
        return ""
    start, top, end, bottom = line
    if bottom < y.low:  # ends where it meets the axis
        end, bottom = start + (end - start) * (top - y.low) / (top - bottom), y.low
    mark = f'<path class="xmin" d="M{x(start)} {y.start}V{y.end}"/>'
    return f'{mark}<path class="law" d="M{x(start)} {y(top)}L{x(end)} {y(bottom)}"/>'


def _scales(size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]) -> tuple[Scale, Scale]:
    width, height = size
    return Scale(*x, _LEFT, width - _RIGHT), Scale(*y, height - _BOTTOM, _TOP)


def _counted(values: Sequence[float], low: float, high: float, bins: int) -> list[float | None]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    return [count or None for count in counts]


def mark(status: str | None, x: float, y: float, size: float = 4) -> str:
    """Draw the mark of a status, told apart by shape as well as by colour.

    Args:
        status: one of `summary.SEVERITY`; any other looks like the last.
        x: its centre.
        y: its centre.
        size: half its width, in pixels.

    Returns:
        An SVG element.
    """
    r, d = f"{size:g}", f"{2 * size:g}"
    shapes = (
        f"m-{r} -{r}l{d} {d}m0 -{d}l-{d} {d}",
        f"m-{r} -{r}h{d}v{d}h-{d}z",
        f"m0 -{r}l{r} {d}h-{d}z",
        f"m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0",
    )
    place = _place(status)
    return f'<path class="s{place}" d="M{x} {y}{shapes[place]}"/>'


def _place(status: str | None) -> int:
    return SEVERITY.index(status if status in SEVERITY else GOOD)


def _linked(points: Sequence[tuple[int, Row, float, float]], layers: int) -> list[str]:
    """Marks of layers at pixels, each a link to the layer's row; those that need attention in front."""
    size = 4 if layers <= _MANY else 2.5
    parts = []
    for i, row, x, y in sorted(points, key=lambda point: -_place(point[1].get("status"))):
        whole = number(row, "whole_alpha")
        more = "" if whole is None else f", whole matrix {whole:.2f}"
        alpha = with_interval(row, BY_NAME["alpha"])
        label = escape(f"{row['layer']}: alpha {alpha}{more}; {row.get('status') or 'not judged'}")
        point = mark(row.get("status"), x, y, size)
        parts.append(f'<a href="#l{i}" tabindex="-1"><title>{label}</title>{point}</a>')
    return parts
