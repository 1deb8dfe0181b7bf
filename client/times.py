"""Times for people: the API's RFC 3339 texts as ages, lengths and moments."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from client.output import duration


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
