"""What the experiments share: options, figures in one style, and the files of results."""

import argparse
import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from farms_jax.programs import files
from farms_jax.programs.environment import installed_versions
from farms_jax.programs.exits import reported

# Okabe and Ito's colours: told apart by every kind of colour vision.
BASELINE, FARMS, NOISE = "#D55E00", "#0072B2", "#666666"
_DPI = 140
_PACKAGES = ("farms-jax", "jax", "numpy", "scipy")


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
        rows: one per measurement, all with the same keys: the CSV file.
        summary: a few rows: the table that is printed, and in the JSON file.
        facts: whatever else the JSON file is to hold.
        figure: the figure.
    """

    rows: Sequence[Mapping[str, Any]]
    summary: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    figure: Figure


def run(
    name: str,
    usage: str | None,
    options: Callable[[argparse.ArgumentParser], None],
    experiment: Callable[[argparse.Namespace], Result],
) -> None:
    """Run an experiment from the command line: its table to stdout, its figure and numbers to `--out`.

    Args:
        name: of the experiment, and of its files.
        usage: its docstring, shown by `--help`.
        options: adds its own options.
        experiment: does it.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of the results")
    options(parser)
    args = parser.parse_args()
    with reported(f"experiments.{name}"):
        start = time.perf_counter()
        result = experiment(args)
        paths = write(args.out, name, result, vars(args), time.perf_counter() - start)
        print(f"{table(result.summary)}\n\nwritten: {', '.join(map(str, paths))}")


def write(out: Path, name: str, result: Result, settings: Mapping[str, Any], seconds: float) -> list[Path]:
    """Write the figure, the JSON and the CSV file of an experiment, each atomically.

    Args:
        out: folder.
        name: of the files.
        result: what was found.
        settings: of the experiment, for the JSON file.
        seconds: that it took.

    Returns:
        The files.
    """
    paths = [out / f"{name}.{ending}" for ending in ("png", "json", "csv")]
    with files.atomic(paths[0]) as part:
        result.figure.savefig(part, dpi=_DPI, format="png")
    versions = installed_versions(*_PACKAGES)
    content = {"settings": dict(settings), "versions": versions, "seconds": round(seconds, 1)}
    files.write_json(paths[1], {**content, **result.facts, "summary": result.summary})
    with files.atomic(paths[2]) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    return paths


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out as text.

    >>> print(table([{"layer": "conv1", "alpha": 2.1218}, {"layer": "linear", "alpha": 12.0}]))
    layer   alpha
    conv1   2.122
    linear  12.00

    Args:
        rows: with the same keys; at least one.

    Returns:
        The table, numbers with four digits.
    """
    texts = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numeric = [isinstance(value, int | float) for value in rows[0].values()]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in texts
    )


def _cell(value: Any) -> str:
    return f"{value:#.4g}" if isinstance(value, float) else str(value)


def figure(width: float, height: float, rows: int = 1, cols: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Make an empty figure in the style of all experiments.

    Args:
        width: in inches.
        height: in inches.
        rows: of plots.
        cols: of plots.
        **layout: for `Figure.subplots`.

    Returns:
        The figure and its plots, row after row.
    """
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = list(drawing.subplots(rows, cols, squeeze=False, **layout).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2, lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5)
    return drawing, axes


def label(axis: Axes, title: str, x: str | None = None, y: str | None = None) -> None:
    """Title a plot and name its axes."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x or "", fontsize=9.5)
    axis.set_ylabel(y or "", fontsize=9.5)


def positive(text: str) -> int:
    """Read an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
