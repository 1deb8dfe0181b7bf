"""What several resources share: times, and the check that a database can keep a text."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, overload

from pydantic import AfterValidator, AwareDatetime, BeforeValidator

DEFAULT_PRIORITY = 100
"""Of a job whose request names none."""
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _require_rfc_3339(value: object) -> object:
    """Refuse what pydantic would take, too: numbers, and times that leave out their offset."""
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    raise ValueError("must be a time as RFC 3339 writes it, such as 2026-01-05T09:30:00Z")


def _to_utc(at: datetime) -> datetime:
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999") from None


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_require_rfc_3339, json_schema_input_type=AwareDatetime),
    AfterValidator(_to_utc),
]
"""A time in a request."""


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


def with_moments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts of an event or of the audit log with their times as the rest of the API writes them.

    >>> with_moments({"changes": {"run_at": 1000, "priority": 5}, "expires_at": None})
    {'changes': {'run_at': '1970-01-01T00:00:01.000Z', 'priority': 5}, 'expires_at': None}
    """
    return {name: _with_moments(name, value) for name, value in facts.items()}


def _with_moments(name: str, value: Any) -> Any:
    if name == "changes" and isinstance(value, Mapping):
        return with_moments(value)
    if name.endswith("_at") and type(value) is int:
        # Zero stands for what was asked for as null: at once.
        return moment(value).isoformat(timespec="milliseconds").replace("+00:00", "Z") if value else None
    return value


@overload
def milliseconds(at: datetime) -> int: ...
@overload
def milliseconds(at: None) -> None: ...
def milliseconds(at: datetime | None) -> int | None:
    """Turn a time into the job store's milliseconds.

    >>> milliseconds(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC))
    1000
    """
    return None if at is None else round((at - _EPOCH).total_seconds() * 1000)
