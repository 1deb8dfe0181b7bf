"""What lists of rows have in common."""

from sqlalchemy import ColumnElement


def between(column: ColumnElement[int], first: int | None, end: int | None) -> list[ColumnElement[bool]]:
    """Return the conditions that a time is not before `first` and before `end`, of which both may be left out."""
    found = [] if first is None else [column >= first]
    return found if end is None else [*found, column < end]
