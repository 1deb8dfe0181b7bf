"""What happens to every request: an id, a body limit, security headers and one log line."""

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from urllib.parse import quote

import anyio
import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra import tracing
from service.errors import ProblemError, problem_response
from service.metrics import REQUEST_SECONDS, REQUESTS

log = structlog.get_logger(__name__)

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET_PATHS = ("/healthz", "/readyz", "/metrics", "/static/")
"""What is asked for all the time and tells nothing."""
_DRAIN_SECONDS = 1.0
_DRAIN_BYTES = 16_000_000
_PLAIN = "".join(map(chr, range(0x21, 0x7F)))
_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_DEFAULTS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
_DEFAULTS.append((b"cache-control", b"no-store"))
_EVENTS = b"text/event-stream"


class RequestContext:
    """Gives each request an id (the caller's, when it is a sane one) and headers; logs and counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        scope.setdefault("state", {})["request_id"] = request_id
        record = _Record(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = {"X-Request-Id": request_id, **scope["state"].get("extra_headers", {})}
                message["headers"] = headers = _completed(message.get("headers", ()), ours)
                record.status = message["status"]
                record.is_stream = any(pair[0] == b"content-type" and pair[1].startswith(_EVENTS) for pair in headers)
            await send(message)

        # The event loop may run this in the context of the request before on the same connection.
        structlog.contextvars.clear_contextvars()
        tracing.annotate({"duquant.request_id": request_id})
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                if _CONTROL.search(scope["path"]):
                    # No path has one; routes would take a line end behind a name for a part of nothing.
                    nothing = ProblemError("not-found", "There is nothing at a path with a control character in it.")
                    await problem_response(Request(scope), nothing)(scope, receive, send_with_headers)
                else:
                    await self.app(scope, receive, send_with_headers)
            finally:
                record.end()


def _completed(given: Iterable[tuple[bytes, bytes]], ours: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers with ours in the place of any of the same name, and the defaults that it lacks."""
    own = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in ours.items()]
    names = {name for name, _ in own}
    kept = [pair for pair in given if pair[0] not in names]
    names.update(name for name, _ in kept)
    return [*kept, *own, *(pair for pair in _DEFAULTS if pair[0] not in names)]


class _Record:
    """What is noted of one request when it has ended."""

    def __init__(self, scope: Scope) -> None:
        self.status = 500
        self.is_stream = False
        self._scope = scope
        self._started = time.perf_counter()

    def end(self) -> None:
        """Count the request and write its log line."""
        method, path = self._scope["method"], self._scope["path"]
        seconds = time.perf_counter() - self._started
        # The template and never the path: ids in it would make a series for each job.
        route = getattr(self._scope.get("route"), "path", "none")
        REQUESTS.labels(method if method in _METHODS else "other", route, str(self.status)).inc()
        if not self.is_stream:
            REQUEST_SECONDS.labels(method if method in _METHODS else "other", route).observe(seconds)
        if not path.startswith(QUIET_PATHS):
            job_id = self._scope.get("path_params", {}).get("job_id")
            about = {} if job_id is None else {"job_id": job_id}
            # As it was sent, with its escapes: a decoded one could hold line ends or commands to a terminal.
            raw = self._scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            shown = quote(raw, safe=_PLAIN)
            log.info("http_request", method=method, path=shown, status=self.status, seconds=round(seconds, 4), **about)


class BodyLimit:
    """Refuses a body over the limit, by its declared length or while it arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int] | None = None) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.larger = larger or {}
        """Limits of paths that take more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.larger.get(scope["path"], self.max_bytes)
        declared = Headers(scope=scope).get("content-length", "")
        too_large = HTTPException(413, f"The body is over the limit of {limit} bytes.", {"Connection": "close"})
        # Longer than any honest length: int() itself refuses absurdly long numbers.
        refused = declared.isdecimal() and (len(declared) > 18 or int(declared) > limit)
        received = 0

        async def limited() -> Message:
            nonlocal received
            if refused:
                raise too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                await _throw_away(receive, message)
                raise too_large
            return message

        # The exception comes up inside the endpoint's own read of the body, where the app's error handlers see it.
        await self.app(scope, limited, send)


async def _throw_away(receive: Receive, message: Message) -> None:
    """Read on for a moment: to close on a client that still sends would break the connection before it reads why."""
    thrown = 0
    with anyio.move_on_after(_DRAIN_SECONDS):
        while message.get("more_body", False) and thrown < _DRAIN_BYTES:
            message = await receive()
            thrown += len(message.get("body", b""))
