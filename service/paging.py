"""Pages of lists, newest first: an opaque cursor that names the last row shown, so that new rows move nothing."""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar

from fastapi import Query

from service.errors import FieldProblem, ProblemError

Place = tuple[int, str]
"""created_at and id of a row."""

Limit = Annotated[int, Query(ge=1, le=200, description="Most items on a page")]
Cursor = Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")]


class _Row(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> int: ...


RowT = TypeVar("RowT", bound=_Row)


def cut(rows: Sequence[RowT], limit: int) -> tuple[Sequence[RowT], str | None]:
    """Return a page and the cursor of the next, from `limit` + 1 rows: the one too many says that there is a next."""
    page = rows[:limit]
    return page, write_cursor(page[-1].created_at, page[-1].id) if len(rows) > limit else None


def write_cursor(created_at: int, row_id: str) -> str:
    """Return the cursor of the page after this row.

    >>> read_cursor(write_cursor(5, "job_1"), "job_")
    (5, 'job_1')
    """
    return base64.urlsafe_b64encode(json.dumps([created_at, row_id]).encode()).decode().rstrip("=")


def read_cursor(cursor: str | None, prefix: str | None) -> Place | None:
    """Take a cursor apart. It only moves within the caller's own rows, so it needs no signature.

    Args:
        cursor: What the caller sent; none is the first page.
        prefix: What the ids of this list begin with: the cursor of another list would show an empty page. None for ids
            that people choose, which have no underscore.

    Raises:
        ProblemError: it is none of ours.
    """
    if cursor is None:
        return None
    try:
        created_at, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        is_good = type(created_at) is int and abs(created_at) < 2**62 and isinstance(row_id, str)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        is_good = False
    is_ours = is_good and ("_" not in row_id if prefix is None else row_id.startswith(prefix))
    if not is_ours or "\0" in row_id or not row_id.isascii():
        detail = "cursor must be the next_cursor of the page before, of this list"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="query", pointer="/cursor", detail=detail)]
        )
    return created_at, row_id
