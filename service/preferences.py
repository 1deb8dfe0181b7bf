"""`Prefer: wait=N` (RFC 7240): hold the answer back until there is news, which saves asking again and again."""

import asyncio
import re
from typing import Annotated

from fastapi import Header

from service.context import Context

LONGEST_WAIT_SECONDS = 60
_POLL_SECONDS = 0.25
_SLOWEST_POLL_SECONDS = 1.0
_WAIT = re.compile(r'(?:^|[,;])\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?=[,;]|$)', re.IGNORECASE)

Prefer = Annotated[
    str | None,
    Header(
        max_length=200,
        description=f"wait=N holds the answer back for up to N seconds (at most {LONGEST_WAIT_SECONDS}) for news",
        examples=["wait=30"],
    ),
]


def wait_seconds(prefer: str | None) -> int:
    """Return how long the caller would wait; as the RFC says, a preference that cannot be read is none.

    >>> wait_seconds("respond-async, wait=10"), wait_seconds("wait=9999"), wait_seconds("wait=soon"), wait_seconds(None)
    (10, 60, 0, 0)
    """
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), LONGEST_WAIT_SECONDS) if found else 0


class Wait:
    """The time that an answer may be held back, in pauses; it is over at once when the server stops."""

    def __init__(self, service: Context, seconds: float) -> None:
        self._stopping = service.stopping
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + seconds
        self._pause = _POLL_SECONDS

    async def pause(self) -> bool:
        """Wait a moment; return False, at once, when the time is up."""
        left = self._until - self._loop.time()
        if left <= 0 or self._stopping.is_set():
            return False
        pause, self._pause = min(self._pause, left), min(self._pause * 1.25, _SLOWEST_POLL_SECONDS)
        try:
            async with asyncio.timeout(pause):
                await self._stopping.wait()
        except TimeoutError:
            return True
        return False
