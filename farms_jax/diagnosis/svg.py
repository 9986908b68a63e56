"""Matplotlib figures as small SVG elements of an HTML page, in the page's colours, with tooltips.

Matplotlib writes a document: with fonts, identifiers, clipping, nested groups and six decimals. A page of two hundred
spectra keeps what is seen of it: a third of the size, and colours that a dark screen can change.
"""

import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from farms_jax.diagnosis.figures import COLOURS

_SOFT = "#566170"  # of axes and texts
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts stay texts, in the page's font
    "svg.hashsalt": "farms",  # the same figure is the same file
    "figure.dpi": 72,  # a point is a pixel
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("font.size", "axes.labelsize"), 12),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _SOFT),
    **dict.fromkeys(("text.color", "grid.color"), _SOFT),
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in {**COLOURS, "soft": _SOFT}.items()}
_DEFAULTS = {"stroke-width": "1", "fill-opacity": "1", "stroke-opacity": "1", "opacity": "1"}
_DEFAULTS |= {"text-anchor": "start", "font-size": "12px"}  # the page's
_KEPT = ("fill", "stroke", "stroke-dasharray", *_DEFAULTS)


def inline_svg(figure: Figure, label: str, tooltips: Mapping[str, str]) -> str:
    """Return a figure drawn under `STYLE` as one `<svg>` element; all texts are escaped.

    `label` describes it to screen readers, `tooltips` has a text per target of a link.
    """
    file = io.StringIO()
    # `savefig` would draw everything twice.
    FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    inside = "".join(_element(child, tooltips) for child in root)
    return f'<svg viewBox="{root.get("viewBox")}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _element(element: ElementTree.Element, tooltips: Mapping[str, str]) -> str:
    tag = element.tag.partition("}")[2]
    given = {name.partition("}")[2] or name: value for name, value in element.items()}
    style = _style(given.get("style", ""))
    if tag in {"metadata", "style", "clipPath"} or style is None:
        return ""
    inside = escape((element.text or "").strip()) + "".join(_element(child, tooltips) for child in element)
    if tag == "g" or (tag == "defs" and not inside):
        return inside
    attributes = {"style": style} | {name: _shorter(given[name]) for name in ("x", "y", "transform") if name in given}
    if tag == "path":
        # Markers are drawn once and used by name; equal names mean equal markers, in all figures of a page.
        name, path = given.get("id", ""), given.get("d", "")
        attributes |= {"id": name, "d": _path(path, digits=2 if name else 1)}
    if "href" in given:
        attributes["href"] = given["href"]
    if tag == "a":
        inside = f"<title>{escape(tooltips[given['href']])}</title>{inside}"
        attributes["tabindex"] = "-1"
    written = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items() if value)
    return f"<{tag}{written}>{inside}</{tag}>" if inside else f"<{tag}{written}/>"


def _style(text: str) -> str | None:
    """Return what is visible of a style, in the page's colours; `None` for an element that is not."""
    parts = {name.strip(): value.strip() for name, _, value in (part.partition(":") for part in text.split(";"))}
    if float(parts.get("opacity", "1")) == 0 or (parts.get("fill") == "none" and parts.get("stroke", "none") == "none"):
        return None
    kept = {name: _VARIABLES.get(parts[name], parts[name]) for name in _KEPT if name in parts}
    return ";".join(f"{name}:{value}" for name, value in kept.items() if _DEFAULTS.get(name) != value)


def _shorter(text: str, digits: int = 1) -> str:
    """Round all numbers, by default to a tenth of a pixel."""
    if text.startswith("rotate(-0 "):
        return ""
    return re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), digits) + 0.0:g}", text)


def _path(text: str, digits: int) -> str:
    """Shorten the `d` of a path: horizontal and vertical lines name one coordinate."""
    written, x, y = "", "", ""
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", _shorter(text, digits)):
        *_, new_x, new_y = ["", "", *numbers.split()]
        if command == "L" and (new_x, new_y) == (x, y):
            continue
        if command == "L" and new_y == y:
            written += f"H{new_x}"
        elif command == "L" and new_x == x:
            written += f"V{new_y}"
        else:
            written += command + " ".join(numbers.split())
        x, y = new_x, new_y
    return written
