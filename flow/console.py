"""How commands speak: results on standard output, everything else on standard error.

With ``--json``, standard output carries exactly one JSON document. Tables are drawn for the width of a terminal; in a
pipe or a file they take the width that they need, so that no cell is cut.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import click

from termwise.flow.records import to_json

Item = TypeVar("Item")


def print_json(document: Any) -> None:
    """One strict JSON document on standard output."""
    click.echo(to_json(document), nl=False)


def say(sentence: str) -> None:
    """A message on standard error."""
    click.echo(f"termwise: {sentence}", err=True)


def warn(sentence: str) -> None:
    """A warning on standard error."""
    say(f"warning: {sentence}")


def print_text(text: str) -> None:
    """A line on standard output."""
    click.echo(text)


def progress(items: Iterable[Item], *, total: int, label: str, unit: str) -> Iterator[Item]:
    """``items``, with a progress bar on standard error while they are taken (a terminal only)."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=label, unit=unit, file=sys.stderr, disable=None, leave=False)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | Collection[int] = 1
) -> None:
    """A table on standard output.

    Args:
        title: line above the table.
        columns: headings.
        rows: cells as text, as many per row as there are columns.
        left: the columns of text (aligned left), by number, or how many there are from the first; the others are
            numbers (aligned right).
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    aligned_left = range(left) if isinstance(left, int) else left
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(columns):
        table.add_column(Text(heading), justify="left" if index in aligned_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(file=sys.stdout, highlight=False, width=100_000, color_system=None)
    wide = Console(file=sys.stdout, highlight=False, width=max(80, wide.measure(table).maximum), color_system=None)
    with wide.capture() as capture:
        wide.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a table: ``digits`` significant digits, thousands separated, a dash where there is none.

    >>> number(1234567), number(3.14159), number(None), number(0.000012345), number(123456.78)
    ('1,234,567', '3.142', '–', '1.234e-05', '123,457')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e12):
        return f"{value:.{digits}g}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
