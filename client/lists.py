"""What the commands that list things have in common: how lists are narrowed, and how they go on."""

from typing import Annotated

import typer

from client.output import note

LimitOption = Annotated[int, typer.Option(min=1, max=200, help="Most rows to list.")]
CursorOption = Annotated[str | None, typer.Option(help="next_cursor of the page before.")]
OfModel = Annotated[str | None, typer.Option(help="Only what belongs to the model with this name.")]
OfRecipe = Annotated[str | None, typer.Option(help="Only what was made with the recipe of this name.")]
WithTag = Annotated[str | None, typer.Option(help="Only artifacts with this tag; TAG* for the beginning of one.")]


def tell_of_more(command: str, next_cursor: str | None) -> None:
    """Say how to see the next page, if there is one."""
    if next_cursor is not None:
        note(f"more: duquant {command} --cursor {next_cursor}")
