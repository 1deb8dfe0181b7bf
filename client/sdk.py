"""`Client`: the service from Python.

with Client("http://127.0.0.1:8000", key) as client:
    job = client.submit("demo:smollm2-135m", "duquant")
    client.wait(job.id)
    client.pull(job.id, Path("smollm2-int4"))
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from client import download, sse
from client.errors import ApiError, BadInputError, UnavailableError, WaitTimeoutError
from client.models import Artifact, Event, Job, JobPage, parse_model

_READ_SECONDS = 30.0
_QUIET_SECONDS = 25.0
"""The service sends a sign of life every 15 s; a stream that is silent for this long is dead."""
_OUTAGE_SECONDS = 60.0
_REFRESH_SECONDS = 0.5
_FIRST_POLL_SECONDS = 0.5
_SLOWEST_POLL_SECONDS = 5.0
_TRIES = 3


class Client:
    """A connection to one service with one API key. Close it, or use it in a `with` statement."""

    def __init__(
        self, url: str, key: str, *, timeout_s: float = _READ_SECONDS, transport: httpx.BaseTransport | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInputError(f"{url!r} is no service URL; it looks like http://127.0.0.1:8000")
        if not key.isascii() or not key.isprintable():
            raise BadInputError("the API key has characters that no key has")
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}", "User-Agent": "duquant-client"},
                timeout=httpx.Timeout(timeout_s, connect=5.0),
                transport=transport,
            )
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

    def submit(
        self,
        model: str | Mapping[str, Any],
        recipe: str | Mapping[str, Any] | None = None,
        *,
        calibration: Mapping[str, Any] | None = None,
        priority: int | None = None,
        force: bool = False,
    ) -> Job:
        """Submit a quantization job; `reused` on the result says that the same work was there already.

        Raises:
            ApiError: the service refuses the request; `errors` names the fields.
            UnavailableError: the service does not answer.
        """
        body: dict[str, Any] = {"model": parse_model(model) if isinstance(model, str) else dict(model), "force": force}
        optional = {"recipe": recipe, "calibration": calibration, "priority": priority}
        body |= {name: value for name, value in optional.items() if value is not None}
        # Without force the same request again returns the same job, so trying again is safe.
        return Job.from_json(self._json("POST", "/v1/jobs", tries=1 if force else _TRIES, json=body))

    def get(self, job_id: str) -> Job:
        """Read a job."""
        return Job.from_json(self._json("GET", f"/v1/jobs/{_segment(job_id)}"))

    def list(self, *, state: str | None = None, limit: int = 50, cursor: str | None = None) -> JobPage:
        """Read a page of jobs, newest first."""
        given = {"state": state, "limit": limit, "cursor": cursor}
        page = self._json("GET", "/v1/jobs", params={name: value for name, value in given.items() if value is not None})
        return JobPage(items=tuple(Job.from_json(item) for item in page["items"]), next_cursor=page["next_cursor"])

    def cancel(self, job_id: str) -> Job:
        """Cancel a job, or ask a running one to stop."""
        return Job.from_json(self._json("POST", f"/v1/jobs/{_segment(job_id)}:cancel"))

    def recipes(self) -> Any:
        """Read the presets."""
        return self._json("GET", "/v1/recipes")["items"]

    def layers(self, job_id: str) -> Any:
        """Read a job's layers."""
        return self._json("GET", f"/v1/jobs/{_segment(job_id)}/layers")["items"]

    def artifact(self, job_id: str) -> Artifact:
        """Read the files of a finished job, with fresh download links."""
        return Artifact.from_json(self._json("GET", f"/v1/jobs/{_segment(job_id)}/artifact"))

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield a job's events until it has ended or the stream breaks; go on with the last one's id.

        Raises:
            ApiError: the service refuses.
            UnavailableError: the stream broke.
        """
        for event in self._stream(job_id, after, _QUIET_SECONDS):
            if event.type == "end":
                return
            values = event.data
            yield Event(
                id=values["id"], at=values["at"], type=values["type"], actor=values["actor"], data=values["data"]
            )

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
                if time.monotonic() - lost_since > _OUTAGE_SECONDS:
                    raise

    def pull(
        self,
        job_id: str,
        out: Path,
        *,
        parallel: int = 4,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> download.PullSummary:
        """Fetch an artifact into the folder `out`. Whole files are kept, cut-off ones are continued.

        Raises:
            DownloadError: a file does not match its checksum.
            BadInputError: the folder cannot be used, or a name would lead out of it.
        """
        return download.pull(lambda: self.artifact(job_id), out, parallel=parallel, on_bytes=on_bytes)

    def _changes(self, job_id: str, deadline: float | None) -> Iterator[None]:
        """Yield now and then while events come in; end when the stream does, for whatever reason."""
        quiet_s = _QUIET_SECONDS if deadline is None else max(0.1, min(_QUIET_SECONDS, deadline - time.monotonic()))
        shown = 0.0
        try:
            for event in self._stream(job_id, 0, quiet_s, deadline):
                if event.type == "end" or time.monotonic() - shown > _REFRESH_SECONDS:
                    yield
                    shown = time.monotonic()
        except (UnavailableError, ApiError):
            return  # asking for the job says what is wrong, if anything is

    def _stream(
        self, job_id: str, after: int, quiet_s: float, deadline: float | None = None
    ) -> Iterator[sse.ServerSentEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        timeout = httpx.Timeout(quiet_s, connect=5.0)
        path = f"/v1/jobs/{_segment(job_id)}/events"
        try:
            with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise _api_error(answer)
                yield from sse.parse(_until(deadline, answer.iter_lines()))
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"the event stream of {self.url} broke: {error or type(error).__name__}") from error

    def _json(self, method: str, path: str, *, tries: int = _TRIES, **options: Any) -> Any:
        for attempt in range(1, tries + 1):
            is_last = attempt == tries
            try:
                answer = self._http.request(method, path, **options)
            except httpx.ConnectError as error:
                # Nothing listens there: another moment does not help a person who mistyped a port.
                raise UnavailableError(f"cannot reach {self.url}: {error}; is `duquant up` running?") from error
            except httpx.HTTPError as error:
                if is_last:
                    reason = str(error) or type(error).__name__
                    raise UnavailableError(f"{self.url} did not answer: {reason}") from error
            except ValueError as error:
                raise BadInputError(f"this cannot be sent as JSON: {error}") from error
            else:
                if answer.is_success:
                    return _decoded(answer)
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or is_last:
                    raise _api_error(answer)
            time.sleep(0.5 * attempt)
        raise AssertionError("the last try returns or raises")


def _until(deadline: float | None, lines: Iterator[str]) -> Iterator[str]:
    """Yield lines until the deadline. Keep-alive lines count: they are no events, but they show that time passes."""
    for line in lines:
        if deadline is not None and time.monotonic() >= deadline:
            return
        yield line


def _segment(job_id: str) -> str:
    """Refuse an id that would change the path it is put in."""
    if not job_id or not job_id.replace("_", "").isalnum() or not job_id.isascii():
        raise BadInputError(f"{job_id!r} is no job id; one looks like job_0199a1b2...")
    return job_id


def _decoded(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise UnavailableError(f"{answer.url} did not answer with JSON; is it a duquant service?") from error


def _api_error(answer: httpx.Response) -> ApiError:
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"{answer.url} answered {answer.status_code} and no reason; is it a duquant service?"}
    return ApiError(answer.status_code, problem)
