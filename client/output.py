"""How commands speak: data on stdout (with --json exactly one line of JSON), everything else on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

chatter = Console(stderr=True, highlight=False)
"""For people: progress, notes, errors."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout.")]


def print_json(value: object) -> None:
    """Print one line of JSON on stdout."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Print a result for people on stdout, exactly as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people on stdout. Nothing is cut or folded, so that `grep` and `cut` work on it."""
    cells = [list(columns), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        print_text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_pairs(values: Mapping[str, Any]) -> None:
    """Print names and values for people on stdout."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if value is not None:
            print_text(f"{name:<{width}}  {value}")


def note(text: str) -> None:
    """Say something to a person."""
    chatter.print(text, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Write a length of time for people.

    >>> duration(4.2), duration(75), duration(7322)
    ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Write a number of bytes for people.

    >>> size(1_500_000)
    '1.5 MB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
