"""Server-sent events of one job, or of the whole queue. No database session is held between two reads."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import anyio.to_thread
from fastapi.responses import StreamingResponse

from infra.errors import InfraError
from infra.jobs import JobEvent
from service.context import Context
from service.errors import ProblemError
from service.metrics import STREAMS
from service.schemas.common import moment, with_moments

POLL_SECONDS = 0.5
SLOWEST_POLL_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 15.0
RETRY_MS = 3000
_FREE_SOON_SECONDS = 5
LONGEST_SECONDS = 600.0
"""A stream ends after this; the client comes back with Last-Event-ID. It bounds what a forgotten tab costs."""


@contextmanager
def counted(service: Context, key_id: str) -> Iterator[None]:
    """Count a stream against the limit of its key, for as long as it is open: from before the answer to its end.

    Raises:
        ProblemError: the key has as many open as it may.
    """
    if not service.streams.has_room(key_id):
        detail = f"This key has {service.streams.most} event streams open, which is as many as it may; close one."
        raise ProblemError("too-many-streams", detail, headers={"Retry-After": str(_FREE_SOON_SECONDS)})
    with service.streams.one(key_id), STREAMS.track_inprogress():
        yield


def respond(stream: AsyncIterator[str]) -> StreamingResponse:
    """Send a stream of events."""
    # A proxy that collects the answer before passing it on would hold every event back.
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def encode(event: JobEvent) -> str:
    """Write a job event as a server-sent event."""
    at = moment(event.at).isoformat().replace("+00:00", "Z")
    data = {"id": event.id, "job_id": event.job_id, "at": at, "type": event.type, "actor": event.actor}
    facts = with_moments(event.data)
    # JSON has no bare line ends, so one data line always suffices.
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps({**data, 'data': facts})}\n\n"


async def job_events(service: Context, job_id: str, after: int) -> AsyncIterator[str]:
    """Yield a job's events from after the given id, then each new one, until the job has ended and all are sent."""

    def read(after: int) -> tuple[bool, list[JobEvent]]:
        # The state first: if the job ends in between, its last event is in what is read next.
        has_ended = service.jobs.get(job_id).state.is_terminal
        return has_ended, service.jobs.events(job_id, after=after)

    yield f"retry: {RETRY_MS}\n\n"
    pause = _Pause(service)
    while not pause.is_over:
        try:
            has_ended, events = await anyio.to_thread.run_sync(read, after)
        except InfraError:
            # The headers are long sent. Ending makes the client come back, and then it gets a proper problem.
            return
        for event in events:
            after = event.id
            yield encode(event)
        if has_ended and not events:
            yield "event: end\ndata: {}\n\n"
            return
        if not events and await pause.wait():
            yield ": keep-alive\n\n"
        elif events:
            pause.reset()


async def changes(service: Context, read: Callable[[], str]) -> AsyncIterator[str]:
    """Yield a `change` event whenever `read` gives another text than before."""
    yield f"retry: {RETRY_MS}\n\n"
    pause = _Pause(service)
    last: str | None = None
    while not pause.is_over:
        try:
            now = await anyio.to_thread.run_sync(read)
        except InfraError:
            return
        if now != last:
            # Also the first time: the page may be older than this stream.
            last = now
            pause.reset()
            yield "event: change\ndata: {}\n\n"
        if await pause.wait():
            yield ": keep-alive\n\n"


class _Pause:
    """Waits between reads, longer while nothing happens, and says when a sign of life is due."""

    def __init__(self, service: Context) -> None:
        self._stopping = service.stopping
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + LONGEST_SECONDS
        self._quiet_since = self._loop.time()
        self._seconds = POLL_SECONDS

    @property
    def is_over(self) -> bool:
        return self._stopping.is_set() or self._loop.time() > self._until

    def reset(self) -> None:
        self._seconds = POLL_SECONDS
        self._quiet_since = self._loop.time()

    async def wait(self) -> bool:
        """Wait; return whether a keep-alive is due."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
        self._seconds = min(self._seconds * 1.25, SLOWEST_POLL_SECONDS)
        is_due = self._loop.time() - self._quiet_since > KEEP_ALIVE_SECONDS
        if is_due:
            self._quiet_since = self._loop.time()
        return is_due
