"""Times as people write them."""

from datetime import UTC, datetime

import pytest

from client.errors import BadInputError
from client.times import time_of

NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-01-05T12:00:00+00:00"),
        ("+90", "2026-01-05T12:01:30+00:00"),
        ("-12h", "2026-01-05T00:00:00+00:00"),
        ("2026-02-01", "2026-02-01T00:00:00+00:00"),
        ("2026-02-01T09:30:00Z", "2026-02-01T09:30:00+00:00"),
        ("2026-02-01T09:30:00.25-05:00", "2026-02-01T14:30:00.250000+00:00"),
    ],
)
def test_times_are_read_as_iso_8601_or_from_now(text: str, expected: str) -> None:
    assert time_of(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "+", "2h", "+2w", "soon", "2026-02-30", "0001-01-01T00:00+05:00", "+999999999d"])
def test_what_is_no_time_is_bad_input(text: str) -> None:
    with pytest.raises(BadInputError):
        time_of(text, NOW)
