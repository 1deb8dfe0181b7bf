"""Limits in the memory of this process: for each API key a token bucket of requests, and how many streams are open.

Several API processes each count for themselves, so a key gets up to the limit from each of them, and a restart fills
every bucket: the limits protect a process from a runaway client. Quotas, which are kept in the database, are exact.
"""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_SWEEP_AT = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may go on, and how much is left."""

    is_allowed: bool
    limit: int
    """Requests that may come at once."""
    remaining: int
    window_s: int
    """Seconds in which an empty bucket fills."""
    full_in_s: int
    """Seconds until the bucket is full again."""
    retry_in_s: int
    """Seconds until the next request is allowed; 0 when one is."""

    @property
    def headers(self) -> dict[str, str]:
        """The fields of draft-ietf-httpapi-ratelimit-headers-10, and Retry-After on a refusal."""
        headers = {
            "RateLimit-Policy": f'"key";q={self.limit};w={self.window_s}',
            "RateLimit": f'"key";r={self.remaining};t={self.full_in_s}',
        }
        return headers if self.is_allowed else {**headers, "Retry-After": str(self.retry_in_s)}


class RateLimiter:
    """Token buckets by name: `burst` requests at once, filled again at `per_second`."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_second
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> Verdict:
        """Take one token from a bucket, if there is one."""
        with self._lock:
            now = self._clock()
            if len(self._buckets) >= _SWEEP_AT:
                self._forget_full(now)
            tokens = self._tokens(name, now)
            is_allowed = tokens >= 1
            tokens -= is_allowed
            self._buckets[name] = (tokens, now)
        return Verdict(
            is_allowed=is_allowed,
            limit=self._burst,
            remaining=int(tokens),
            window_s=max(1, math.ceil(self._burst / self._rate)),
            full_in_s=math.ceil((self._burst - tokens) / self._rate),
            retry_in_s=0 if is_allowed else max(1, math.ceil((1 - tokens) / self._rate)),
        )

    def _tokens(self, name: str, now: float) -> float:
        tokens, at = self._buckets.get(name, (float(self._burst), now))
        return min(self._burst, tokens + (now - at) * self._rate)

    def _forget_full(self, now: float) -> None:
        self._buckets = {
            name: bucket for name, bucket in self._buckets.items() if self._tokens(name, now) < self._burst
        }


class OpenStreams:
    """Counts what is open under each name. For one thread, the event loop's."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: Counter[str] = Counter()

    def has_room(self, name: str) -> bool:
        """Whether one more may be opened."""
        return self._open[name] < self.most

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count one as open while the block runs."""
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]


class Remembered(Generic[T]):
    """What was found out a moment ago: however many ask, it is found out once at a time, and not too often."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = asyncio.Lock()
        self._found: tuple[float, T] | None = None

    async def get(self, find: Callable[[], Awaitable[T]]) -> T:
        """Return what `find` gave, at most so many seconds ago."""
        async with self._lock:
            if self._found is None or self._clock() - self._found[0] >= self._seconds:
                self._found = (self._clock(), await find())
            return self._found[1]
