"""What the commands that list things have in common: how lists are narrowed, and how they go on."""

from collections.abc import Sequence
from typing import Annotated

import typer

from client.errors import BadInputError
from client.output import note
from client.times import time_of


def read_time(text: str) -> str:
    """Read a time from an option, whose name the error then has."""
    try:
        return time_of(text)
    except BadInputError as error:
        raise typer.BadParameter(str(error)) from error


LimitOption = Annotated[int, typer.Option(min=1, max=200, help="Most rows to list.")]
CursorOption = Annotated[str | None, typer.Option(help="next_cursor of the page before.")]
OfModel = Annotated[str | None, typer.Option(help="Only what belongs to the model with this name.")]
OfRecipe = Annotated[str | None, typer.Option(help="Only what was made with the recipe of this name.")]
WithTag = Annotated[str | None, typer.Option(help="Only artifacts with this tag; TAG* for the beginning of one.")]
CreatedFrom = Annotated[
    str | None,
    typer.Option(metavar="TIME", parser=read_time, help="Only what was made at this time or later: 2026-01-31, -7d."),
]
CreatedUntil = Annotated[
    str | None, typer.Option(metavar="TIME", parser=read_time, help="Only what was made before this time.")
]


def tell_of_ignored(options: Sequence[str], what: str) -> None:
    """Say which options of a submit did nothing, since the work was there already."""
    if options:
        do = "do" if len(options) > 1 else "does"
        note(f"{', '.join(options)} {do} not apply to {what}; --force makes it anew")


def tell_of_more(command: str, next_cursor: str | None) -> None:
    """Say how to see the next page, if there is one."""
    if next_cursor is not None:
        # The dots are the options of this page: without them the next one is of another list.
        note(f"more: duquant {command} ... --cursor {next_cursor}")
