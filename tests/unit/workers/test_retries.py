"""Pauses between tries."""

import errno
import random

import pytest

from workers.retries import BACK_OFF, ErrorClass, class_of, pause_s


def longest(error: ErrorClass, tries: int) -> float:
    return pause_s(error, tries, first_s=10, jitter=lambda _, high: high)


def test_pauses_double_until_they_reach_the_limit() -> None:
    assert [longest(ErrorClass.OUTAGE, tries) for tries in range(1, 8)] == [10, 20, 40, 80, 160, 300, 300]
    assert [longest(ErrorClass.SCARCITY, tries) for tries in (1, 2, 20)] == [60, 120, 1800]


def test_the_thousandth_try_still_has_a_pause() -> None:
    assert longest(ErrorClass.OUTAGE, 1000) == BACK_OFF[ErrorClass.OUTAGE].limit_s


def test_jitter_spreads_pauses_over_the_whole_time() -> None:
    source = random.Random(1)
    pauses = [pause_s(ErrorClass.OUTAGE, 3, first_s=10, jitter=source.uniform) for _ in range(4000)]
    assert min(pauses) < 1
    assert 39 < max(pauses) <= 40
    assert sum(pauses) / len(pauses) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ErrorClass.SCARCITY),
        (errno.ENOMEM, ErrorClass.SCARCITY),
        (errno.EDQUOT, ErrorClass.SCARCITY),
        (errno.EIO, ErrorClass.OUTAGE),
    ],
)
def test_what_is_full_takes_longer_than_what_is_away(number: int, expected: ErrorClass) -> None:
    assert class_of(OSError(number, "no")) is expected
