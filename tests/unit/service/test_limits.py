"""Token buckets."""

import threading

import pytest

from service.limits import OpenStreams, RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(2.0, 3, clock)
    assert [limiter.take("a").is_allowed for _ in range(4)] == [True, True, True, False]
    clock.now += 0.5
    assert [limiter.take("a").is_allowed for _ in range(2)] == [True, False]
    clock.now += 100
    assert [limiter.take("a").is_allowed for _ in range(4)] == [True, True, True, False]


def test_keys_do_not_share_a_bucket() -> None:
    limiter = RateLimiter(1.0, 1, Clock())
    assert limiter.take("a").is_allowed
    assert limiter.take("b").is_allowed
    assert not limiter.take("a").is_allowed


def test_a_verdict_says_how_much_is_left_and_when_to_come_back() -> None:
    clock = Clock()
    limiter = RateLimiter(0.1, 2, clock)
    first = limiter.take("a")
    assert first.headers == {"RateLimit-Policy": '"key";q=2;w=20', "RateLimit": '"key";r=1;t=10'}
    limiter.take("a")
    refused = limiter.take("a")
    assert refused.headers == {
        "RateLimit-Policy": '"key";q=2;w=20',
        "RateLimit": '"key";r=0;t=20',
        "Retry-After": "10",
    }
    clock.now += refused.retry_in_s
    assert limiter.take("a").is_allowed


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    limiter = RateLimiter(1.0, 1, clock)
    limiter.take("a")
    for _ in range(1000):
        assert not limiter.take("a").is_allowed
    clock.now += 1
    assert limiter.take("a").is_allowed


def test_full_buckets_are_forgotten_so_that_memory_is_bounded() -> None:
    clock = Clock()
    limiter = RateLimiter(1.0, 1, clock)
    for number in range(30_000):
        limiter.take(str(number))
        clock.now += 0.01
    assert len(limiter._buckets) <= 10_001


def test_threads_never_share_a_token() -> None:
    limiter = RateLimiter(1e-6, 500, Clock())
    passed: list[bool] = []

    def run() -> None:
        passed.extend([limiter.take("a").is_allowed for _ in range(250)])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed.count(True) == 500


def test_open_streams_are_counted_by_name_and_given_back_after_an_error() -> None:
    streams = OpenStreams(1)

    def follow() -> None:
        with streams.one("a"):
            assert not streams.has_room("a")
            assert streams.has_room("b")
            raise KeyError

    with pytest.raises(KeyError):
        follow()
    assert streams.has_room("a")
