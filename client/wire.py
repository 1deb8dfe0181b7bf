"""What the blocking and the asynchronous client share: what is sent, what is tried again, and what an error means."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from client.calls import Call, Request
from client.errors import ApiError, BadInputError, ClientError, UnavailableError

CONNECT_SECONDS = 5.0
QUIET_SECONDS = 25.0
"""The service sends a sign of life every 15 s; a stream that is silent for this long is dead."""
OUTAGE_SECONDS = 60.0
RECONNECT_SECONDS = 0.5
TRIES = 3
_CHUNK_BYTES = 1 << 18
_LONGEST_PAUSE_S = 10.0
"""A server that asks for more patience than this is reported at once."""
_AGAIN = frozenset({httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS})


def options(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the options of an httpx client for this service.

    Raises:
        BadInputError: the address or the key cannot be one.
    """
    if not url.startswith(("http://", "https://")):
        raise BadInputError(f"{url!r} is no service URL; it looks like http://127.0.0.1:8000")
    if key and not (key.isascii() and key.isprintable()):
        raise BadInputError("the API key has characters that no key has")
    return {
        "base_url": url.rstrip("/"),
        "headers": {"User-Agent": "duquant-client", **({"Authorization": f"Bearer {key}"} if key else {})},
        "timeout": httpx.Timeout(timeout_s, connect=CONNECT_SECONDS),
        # Without TLS there is nothing to verify, and reading the certificates takes longer than most commands.
        "verify": url.startswith("https://"),
    }


def request_of(call: Request) -> dict[str, Any]:
    """Return what both clients give httpx for a request, except for the content of a file.

    Raises:
        BadInputError: the file cannot be read.
    """
    headers = dict(call.headers)
    if call.file is not None:
        try:
            headers["Content-Length"] = str(call.file.stat().st_size)
        except OSError as error:
            raise BadInputError(f"cannot read {call.file}: {error.strerror}") from error
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.params),
        "json": call.body,
        "headers": headers,
    }


def chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes.

    Raises:
        BadInputError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_CHUNK_BYTES):
                yield piece
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error


def is_answer(call: Call[Any], answer: httpx.Response) -> bool:
    """Return whether the service has answered the call, and not refused it."""
    if answer.is_success:
        return True
    # A 503 of something else, such as a proxy, is a problem or a page.
    is_meant = answer.headers.get("Content-Type", "").startswith("application/json")
    return is_meant and answer.status_code in call.statuses


def pause_after(answer: httpx.Response, attempt: int) -> float | None:
    """Return how long to wait before trying again; none where that is no use.

    A quota that is used up stays so for longer than anybody waits; a rate limit is over in moments.
    """
    if attempt >= TRIES or not _is_passing(answer):
        return None
    asked = answer.headers.get("Retry-After", "")
    pause = float(asked) if asked.isdecimal() else 0.5 * attempt
    return pause if pause <= _LONGEST_PAUSE_S else None


def _is_passing(answer: httpx.Response) -> bool:
    name = str(problem_of(answer).get("type", "")).rpartition(":")[2]
    return answer.status_code in _AGAIN and name != "quota-exceeded"


def pause_after_break(attempt: int) -> float | None:
    """Return how long to wait before trying again after a broken connection; none after the last try."""
    return None if attempt >= TRIES else 0.5 * attempt


def unsent(url: str, error: Exception) -> ClientError:
    """Return our error for a request that did not get an answer."""
    if isinstance(error, httpx.ConnectError):
        return UnavailableError(f"cannot reach {url}: {error}; is `duquant up` running?")
    if isinstance(error, httpx.HTTPError):
        return UnavailableError(f"{url} did not answer: {str(error) or type(error).__name__}")
    return BadInputError(f"this cannot be sent as JSON: {error}")


def decoded(answer: httpx.Response) -> Any:
    """Return the JSON of an answer; none where there is no body.

    Raises:
        UnavailableError: it is no JSON.
    """
    if answer.status_code == httpx.codes.NO_CONTENT:
        return None
    try:
        return answer.json()
    except ValueError as error:
        raise UnavailableError(f"{answer.url} did not answer with JSON; is it a duquant service?") from error


def stream_broken(url: str, error: Exception) -> UnavailableError:
    """Return our error for a stream of events that broke."""
    return UnavailableError(f"the event stream of {url} broke: {str(error) or type(error).__name__}")


class Outage:
    """How long the service has been away from somebody who follows something."""

    def __init__(self) -> None:
        self._has_answered = False
        self._since: float | None = None

    def is_over(self) -> None:
        """Note that the service answers."""
        self._has_answered, self._since = True, None

    def check(self, error: UnavailableError | ApiError) -> None:
        """Raise the error unless it may pass by itself: a service that restarts is back in seconds."""
        is_passing = isinstance(error, UnavailableError) or error.status == httpx.codes.SERVICE_UNAVAILABLE
        self._since = self._since or time.monotonic()
        if not (self._has_answered and is_passing) or time.monotonic() - self._since > OUTAGE_SECONDS:
            raise error


def problem_of(answer: httpx.Response) -> Mapping[str, Any]:
    """Return the problem that an answer holds, or one that says there is none."""
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"detail": f"{answer.url} answered {answer.status_code} and no reason; is it a duquant service?"}


def api_error(answer: httpx.Response) -> ApiError:
    """Return our error for an answer that is one."""
    return ApiError(answer.status_code, problem_of(answer))


def seconds_left(deadline: float | None, now: float) -> float:
    """Return the time to a deadline."""
    return math.inf if deadline is None else max(0.0, deadline - now)
