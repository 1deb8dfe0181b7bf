"""What several resources share: times, and the check that a database can keep a text."""

from datetime import UTC, datetime
from typing import overload


def check_text(value: object) -> None:
    """Refuse strings that no database takes: NUL characters and lone surrogates."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and ("\0" in item or any("\ud800" <= char <= "\udfff" for char in item)):
            raise ValueError("text must not hold NUL characters or lone surrogates")


@overload
def moment(at_ms: int) -> datetime: ...
@overload
def moment(at_ms: None) -> None: ...
def moment(at_ms: int | None) -> datetime | None:
    """Turn the job store's milliseconds into a time."""
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)
