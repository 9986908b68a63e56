"""A table in the terminal: coloured and as wide as the window, plain where the output goes to a file."""

import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from farms_jax._present import optional, text_table
from farms_jax.diagnosis.columns import Column
from farms_jax.diagnosis.table import Row, Sheet, sheet

_STYLES = {"well trained": "green", "undertrained": "yellow", "over-correlated": "magenta", "degenerate": "bold red"}


def show_table(
    rows: Sequence[Row], columns: Sequence[Column], title: str, lines: Sequence[str] = (), *, file: TextIO | None = None
) -> None:
    """Print a table of layers.

    Args:
        rows: one per layer.
        columns: in order; those with a short head are shown.
        title: line above it.
        lines: to stand below it.
        file: where to; by default the standard output.
    """
    out = sys.stdout if file is None else file
    if not out.isatty():
        out.write(plain_text(rows, columns, title, lines, width=None) + "\n")
        return
    console = optional("rich.console").Console(file=out, highlight=False)
    chosen = sheet(rows, columns, console.width)
    console.print(title, style="bold", markup=False)
    console.print(_coloured(chosen))
    for line in [*chosen.notes, *lines]:
        console.print(line, style="dim", markup=False)


def plain_text(
    rows: Sequence[Row], columns: Sequence[Column], title: str, lines: Sequence[str] = (), *, width: int | None = 120
) -> str:
    """Set what `show_table` prints as plain text.

    Args:
        rows: one per layer.
        columns: in order; those with a short head are shown.
        title: line above it.
        lines: to stand below it.
        width: of the table in characters; `None` for as many as it takes.

    Returns:
        Lines.
    """
    chosen = sheet(rows, columns, width)
    below = [*chosen.notes, *lines]
    if width is not None:
        title, *below = (textwrap.fill(line, width, subsequent_indent="  ") for line in (title, *below))
    return "\n".join([title, text_table(chosen.heads, chosen.cells, left=chosen.left), *below])


def _coloured(chosen: Sheet) -> Any:
    Table, Text = optional("rich.table").Table, optional("rich.text").Text  # noqa: N806 (classes)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    for i, head in enumerate(chosen.heads):
        table.add_column(head, justify="left" if i in chosen.left else "right", no_wrap=True)
    for line in chosen.cells:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
    return table
