"""Times for people: the API's RFC 3339 texts as ages, lengths and moments, and what people write in their place."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from client.errors import BadInputError
from client.output import duration

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> int:
    """Return a length of time in seconds.

    Raises:
        BadInputError: it is none.

    >>> seconds_of("90d"), seconds_of("12h"), seconds_of("45")
    (7776000, 43200, 45)
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if match is None:
        raise BadInputError(f"{text!r} is no length of time; one looks like 90d, 12h, 30m or 45s")
    return int(match[1]) * _UNITS[match[2] or "s"]


def time_of(text: str, now: datetime | None = None) -> str:
    """Return a time as the API takes it: from ISO 8601, from `now`, or from now such as +2h or -7d.

    Without an offset it is UTC, as times are printed.

    Raises:
        BadInputError: it is none.

    >>> now = datetime(2026, 1, 5, 12, tzinfo=UTC)
    >>> time_of("+2h", now), time_of("-7d", now)
    ('2026-01-05T14:00:00+00:00', '2025-12-29T12:00:00+00:00')
    >>> time_of("2026-02-01"), time_of("2026-02-01 09:30+01:00")
    ('2026-02-01T00:00:00+00:00', '2026-02-01T08:30:00+00:00')
    """
    try:
        return _time(text, now or datetime.now(UTC)).astimezone(UTC).isoformat()
    except OverflowError as error:
        raise BadInputError(f"{text!r} is outside of the calendar") from error


def _time(text: str, now: datetime) -> datetime:
    if text == "now":
        return now
    sign = {"+": 1, "-": -1}.get(text[:1])
    if sign is not None:
        return now + sign * timedelta(seconds=seconds_of(text[1:]))
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInputError(f"{text!r} is no time; one looks like 2026-01-31T09:30:00Z, +2h or now") from error
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def moment(text: str) -> datetime:
    """Read a time of the API."""
    return datetime.fromisoformat(text)


def ago(text: str | None, now: datetime | None = None) -> str | None:
    """Write how long ago a time was, or how far ahead it is.

    >>> now = datetime(2026, 1, 5, 12, tzinfo=UTC)
    >>> ago("2026-01-05T11:57:00Z", now), ago("2026-01-02T12:00:00Z", now), ago("2026-01-05T12:00:30Z", now)
    ('3 min ago', '3 d ago', 'in 30 s')
    """
    if text is None:
        return None
    seconds = ((now or datetime.now(UTC)) - moment(text)).total_seconds()
    words = _about(abs(seconds))
    # Clocks of two machines differ by a little.
    return f"in {words}" if seconds < -5 else f"{words} ago"


def at(text: str | None, now: datetime | None = None) -> str | None:
    """Write a time to the second, with its age.

    >>> at("2026-01-05T11:57:00.25Z", datetime(2026, 1, 5, 12, tzinfo=UTC))
    '2026-01-05 11:57:00 UTC (2 min ago)'
    """
    if text is None:
        return None
    return f"{moment(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC ({ago(text, now)})"


def took(job: Mapping[str, Any], now: datetime | None = None) -> str | None:
    """Write how long a job ran, or has been running; none while it has not started.

    >>> took({"started_at": "2026-01-05T11:57:00Z", "finished_at": "2026-01-05T11:58:05Z"})
    '1 min 5 s'
    """
    if job.get("started_at") is None:
        return None
    end = moment(job["finished_at"]) if job.get("finished_at") else now or datetime.now(UTC)
    return duration(max(0.0, (end - moment(job["started_at"])).total_seconds()))


def _about(seconds: float) -> str:
    """Write a length of time in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
