"""`AsyncClient`: the same calls as `Client`, for programs with an event loop.

async with AsyncClient("http://127.0.0.1:8000", key) as client:
    job = await client.run(calls.submit_job("demo:smollm2-135m", "duquant"))
    job = await client.wait(job.id)
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from client import calls, sse, wire
from client.calls import Call, Stream
from client.errors import ApiError, BadInputError, UnavailableError, WaitTimeoutError
from client.models import Event, Job

T = TypeVar("T")

_READ_SECONDS = 45.0
_HOLD_SECONDS = 30
"""How long the service may hold an answer back while a job does not change."""


class AsyncClient:
    """A connection to one service with one API key. Close it, or use it in an `async with` statement.

    Without a key it carries out what needs none: health, readiness, version.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = _READ_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        options = wire.options(url, key, timeout_s)
        try:
            self._http = httpx.AsyncClient(**options, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadInputError(f"{url!r} is no service URL: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def run(self, call: Call[T]) -> T:
        """Carry out a call of `client.calls`.

        Raises:
            ApiError: the service refuses it.
            UnavailableError: the service does not answer.
        """
        attempt = 0
        while True:
            attempt += 1
            pause: float | None
            try:
                content = None if call.file is None else _chunks(call.file)
                answer = await self._http.request(**wire.request_of(call), content=content)
            except (httpx.HTTPError, ValueError) as error:
                pause = wire.pause_after_break(attempt)
                is_passing = isinstance(error, httpx.HTTPError) and not isinstance(error, httpx.ConnectError)
                if pause is None or not is_passing:
                    raise wire.unsent(self.url, error) from error
            else:
                if wire.is_answer(call, answer):
                    return call.read(wire.decoded(answer))
                pause = wire.pause_after(answer, attempt)
                if pause is None:
                    raise wire.api_error(answer)
            await asyncio.sleep(pause)

    async def report(self, name: str) -> bytes:
        """Fetch the report on an evaluation, a page of HTML, by the evaluation's id or its job's.

        Raises:
            ApiError: there is no such evaluation, or no report.
            UnavailableError: the service or its object store does not answer.
        """
        try:
            answer = await self._http.request(**wire.request_of(calls.evaluation_report(name)))
            if not answer.has_redirect_location:
                raise wire.api_error(answer)
            # The link holds all the rights it needs: the API key stays with the service.
            async with httpx.AsyncClient(timeout=_READ_SECONDS) as store:
                page = await store.get(answer.headers["Location"])
            page.raise_for_status()
        except httpx.HTTPError as error:
            raise UnavailableError(f"the report cannot be fetched: {str(error) or type(error).__name__}") from error
        return page.content

    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Yield a job's events, from the one after `after`, until it has ended; through a restart of the service.

        Raises:
            ApiError: the service refuses.
            UnavailableError: the service did not answer for a minute, or from the start.
        """
        outage = wire.Outage()
        while True:
            call = calls.follow_job(job_id, after=after)
            try:
                async for event in self._stream(call):
                    outage.is_over()
                    if event.type == "end":
                        return
                    happened = call.read(event.data)
                    after = happened.id
                    yield happened
                outage.is_over()
            except (UnavailableError, ApiError) as error:
                outage.check(error)
            await asyncio.sleep(wire.RECONNECT_SECONDS)

    async def _stream(self, call: Stream[Any]) -> AsyncIterator[sse.ServerSentEvent]:
        parser = sse.Parser()
        timeout = httpx.Timeout(wire.QUIET_SECONDS, connect=wire.CONNECT_SECONDS)
        try:
            async with self._http.stream(**wire.request_of(call), timeout=timeout) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    raise wire.api_error(answer)
                async for line in answer.aiter_lines():
                    if (event := parser.feed(line)) is not None:
                        yield event
        except (httpx.HTTPError, ValueError) as error:
            raise wire.stream_broken(self.url, error) from error

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Return a job when it has ended.

        Raises:
            WaitTimeoutError: the time was up first; the job goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = wire.seconds_left(deadline, time.monotonic())
            job = await self.run(calls.get_job(job_id, hold_s=math.ceil(min(_HOLD_SECONDS, left))))
            if job.has_ended:
                return job
            if left <= 0:
                raise WaitTimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s; it goes on")


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    pieces = wire.chunks(path)
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece
