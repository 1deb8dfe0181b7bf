"""`Client`: the service from Python.

with Client("http://127.0.0.1:8000", key) as client:
    job = client.submit("demo:smollm2-135m", "duquant")
    client.wait(job.id)
    client.pull(job.id, Path("smollm2-int4"))

Whatever has no method of its own is a call: `client.run(calls.list_batches())`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from client import calls, download, sse, wire
from client.calls import Call, Model, Recipe, Settings, Stream
from client.errors import ApiError, BadInputError, UnavailableError, WaitTimeoutError
from client.models import Artifact, Batch, Event, Job, JobPage

T = TypeVar("T")

_READ_SECONDS = 30.0
_REFRESH_SECONDS = 0.5
_FIRST_POLL_SECONDS = 0.5
_SLOWEST_POLL_SECONDS = 5.0


class Client:
    """A connection to one service with one API key. Close it, or use it in a `with` statement.

    Without a key it carries out what needs none: health, readiness, version.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = _READ_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        options = wire.options(url, key, timeout_s)
        try:
            self._http = httpx.Client(**options, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadInputError(f"{url!r} is no service URL: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def run(self, call: Call[T]) -> T:
        """Carry out a call of `client.calls`; what fails in passing is tried again.

        Raises:
            ApiError: the service refuses it; `errors` names the fields.
            UnavailableError: the service does not answer.
        """
        attempt = 0
        while True:
            attempt += 1
            pause: float | None
            try:
                content = None if call.file is None else wire.chunks(call.file)
                answer = self._http.request(**wire.request_of(call), content=content)
            except (httpx.HTTPError, ValueError) as error:
                pause = wire.pause_after_break(attempt)
                # Nothing listens there: another moment does not help a person who mistyped a port.
                is_passing = isinstance(error, httpx.HTTPError) and not isinstance(error, httpx.ConnectError)
                if pause is None or not is_passing:
                    raise wire.unsent(self.url, error) from error
            else:
                if wire.is_answer(call, answer):
                    return call.read(wire.decoded(answer))
                pause = wire.pause_after(answer, attempt)
                if pause is None:
                    raise wire.api_error(answer)
            time.sleep(pause)

    def submit(
        self,
        model: Model,
        recipe: Recipe | None = None,
        *,
        calibration: Mapping[str, Any] | None = None,
        evaluate: Settings | None = None,
        priority: int | None = None,
        force: bool = False,
        **options: Any,
    ) -> Job:
        """Submit a quantization job; `reused` on the result says that the same work was there already.

        `options` are further fields of the API: queue, run_at, deadline_at, depends_on, labels.

        Raises:
            ApiError: the service refuses the request; `errors` names the fields.
            UnavailableError: the service does not answer.
        """
        return self.run(
            calls.submit_job(
                model,
                recipe,
                calibration=calibration,
                evaluate=evaluate,
                priority=priority,
                force=force,
                **options,
            )
        )

    def submit_batch(self, models: Sequence[Model], recipes: Sequence[Recipe] | None = None, **options: Any) -> Batch:
        """Submit every model with every recipe; options: name, calibration, evaluate, priority, queue, force."""
        return self.run(calls.submit_batch(models, recipes, **options))

    def get(self, job_id: str) -> Job:
        """Read a job."""
        return self.run(calls.get_job(job_id))

    def list(self, **filters: Any) -> JobPage:
        """Read a page of jobs, newest first; filters as in the API: state, kind, model, recipe, batch, limit, ..."""
        return self.run(calls.list_jobs(**filters))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job, or ask a running one to stop."""
        return self.run(calls.cancel_job(job_id))

    def retry(self, job_id: str) -> Job:
        """Run a failed or cancelled job again; it goes on from the layers that it has finished."""
        return self.run(calls.retry_job(job_id))

    def recipes(self) -> Any:
        """Read the presets."""
        return self.run(calls.list_recipes())

    def layers(self, job_id: str) -> Any:
        """Read a job's layers."""
        return self.run(calls.list_layers(job_id))

    def artifact(self, name: str) -> Artifact:
        """Read the files of an artifact, by its id or its job's, with fresh download links."""
        return self.run(calls.artifact_files(name))

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield a job's events, from the one after `after`, until it has ended; through a restart of the service.

        Raises:
            ApiError: the service refuses.
            UnavailableError: the service did not answer for a minute, or from the start.
        """
        outage = wire.Outage()
        while True:
            call = calls.follow_job(job_id, after=after)
            try:
                for event in self._stream(call, wire.QUIET_SECONDS):
                    outage.is_over()
                    if event.type == "end":
                        return
                    happened = call.read(event.data)
                    after = happened.id
                    yield happened
                outage.is_over()
            except (UnavailableError, ApiError) as error:
                outage.check(error)
            # The service ends a stream after some minutes, and when it stops.
            time.sleep(wire.RECONNECT_SECONDS)

    def change(self, job_id: str, *, version: int | None = None, **changes: Any) -> Job:
        """Change a waiting job's priority, run_at or queue, an unfinished one's deadline_at, or any job's labels.

        Null takes one away. Labels replace all that the job has.

        Raises:
            ApiError: the service refuses; with status 412 since the job no longer has this `version`.
        """
        return self.run(calls.change_job(job_id, version=version, **changes))

    def wait(
        self, job_id: str, *, timeout_s: float | None = None, on_update: Callable[[Job], None] | None = None
    ) -> Job:
        """Follow a job until it has ended: by its events, or by asking when the stream does not work.

        Raises:
            WaitTimeoutError: the time was up first; the job goes on.
            UnavailableError: the service did not answer for a minute.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.get(job_id)
        pause, lost_since = _FIRST_POLL_SECONDS, None
        while True:
            if on_update is not None:
                on_update(job)
            if job.has_ended:
                return job
            for _ in self._changes(job_id, deadline):
                job = self.get(job_id)
                pause = _FIRST_POLL_SECONDS
                if on_update is not None:
                    on_update(job)
                if job.has_ended:
                    return job
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s; it goes on")
            time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(pause * 1.5, _SLOWEST_POLL_SECONDS)
            try:
                job, lost_since = self.get(job_id), None
            except UnavailableError:
                # A service that restarts is back in seconds; the job does not depend on it.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > wire.OUTAGE_SECONDS:
                    raise

    def wait_for_batch(
        self, batch_id: str, *, timeout_s: float | None = None, on_update: Callable[[Batch], None] | None = None
    ) -> Batch:
        """Return a batch when nothing of it waits or runs any more.

        Raises:
            WaitTimeoutError: the time was up first; the batch goes on.
            UnavailableError: the service did not answer for a minute.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause, lost_since = _FIRST_POLL_SECONDS, None
        batch = self.run(calls.get_batch(batch_id))
        while True:
            if on_update is not None:
                on_update(batch)
            if batch.has_ended:
                return batch
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeoutError(f"{batch_id} is still {batch.state} after {timeout_s:g} s; it goes on")
            time.sleep(min(pause, wire.seconds_left(deadline, time.monotonic())))
            pause = min(pause * 1.5, _SLOWEST_POLL_SECONDS)
            try:
                batch, lost_since = self.run(calls.get_batch(batch_id)), None
            except UnavailableError:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > wire.OUTAGE_SECONDS:
                    raise

    def pull(
        self,
        name: str,
        out: Path,
        *,
        parallel: int = 4,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> download.PullSummary:
        """Fetch an artifact, by its id or its job's, into the folder `out`. What is there is kept and continued.

        Raises:
            DownloadError: a file does not match its checksum.
            BadInputError: the folder cannot be used, or a name would lead out of it.
        """
        return download.pull(lambda: self.artifact(name), out, parallel=parallel, on_bytes=on_bytes)

    def report(self, name: str) -> bytes:
        """Fetch the report on an evaluation, a page of HTML, by the evaluation's id or its job's.

        Raises:
            ApiError: there is no such evaluation, or no report.
            UnavailableError: the service or its object store does not answer.
        """
        call = calls.evaluation_report(name)
        try:
            answer = self._http.request(**wire.request_of(call))
            if not answer.has_redirect_location:
                raise wire.api_error(answer)
            # The link holds all the rights it needs: the API key stays with the service.
            page = httpx.get(answer.headers["Location"], timeout=_READ_SECONDS)
            page.raise_for_status()
        except httpx.HTTPError as error:
            raise UnavailableError(f"the report cannot be fetched: {str(error) or type(error).__name__}") from error
        return page.content

    def _changes(self, job_id: str, deadline: float | None) -> Iterator[None]:
        """Yield now and then while events come in; end when the stream does, for whatever reason."""
        quiet_s = (
            wire.QUIET_SECONDS if deadline is None else max(0.1, min(wire.QUIET_SECONDS, deadline - time.monotonic()))
        )
        shown = 0.0
        try:
            for event in self._stream(calls.follow_job(job_id), quiet_s, deadline):
                if event.type == "end" or time.monotonic() - shown > _REFRESH_SECONDS:
                    yield
                    shown = time.monotonic()
        except (UnavailableError, ApiError):
            return  # asking for the job says what is wrong, if anything is

    def _stream(
        self, call: Stream[Any], quiet_s: float, deadline: float | None = None
    ) -> Iterator[sse.ServerSentEvent]:
        timeout = httpx.Timeout(quiet_s, connect=wire.CONNECT_SECONDS)
        try:
            with self._http.stream(**wire.request_of(call), timeout=timeout) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise wire.api_error(answer)
                yield from sse.parse(_until(deadline, answer.iter_lines()))
        except (httpx.HTTPError, ValueError) as error:
            raise wire.stream_broken(self.url, error) from error


def _until(deadline: float | None, lines: Iterator[str]) -> Iterator[str]:
    """Yield lines until the deadline. Keep-alive lines count: they are no events, but they show that time passes."""
    for line in lines:
        if deadline is not None and time.monotonic() >= deadline:
            return
        yield line
