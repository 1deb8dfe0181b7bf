"""Who is asking: API keys on /v1, a signed cookie on the dashboard."""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import anyio.to_thread
import structlog
from fastapi import Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.base import SecurityBase

from infra.errors import KeyNotFound
from infra.keys import ApiKey
from service.context import Context, context_of
from service.errors import FieldProblem, ProblemError
from service.metrics import RATE_LIMITED

COOKIE = "duquant_session"
Scope = Literal[
    "jobs:read",
    "jobs:write",
    "artifacts:read",
    "artifacts:write",
    "batches:write",
    "webhooks:write",
    "keys:admin",
    "queue:admin",
    "usage:read",
    "tenants:admin",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key can allow. The last one reaches across tenants; the bootstrap key has all of them."""

BEARER = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key: `Authorization: Bearer dq_live_...`"
)


@dataclass(frozen=True)
class Caller:
    """The key that a request is made with; what it may see is its tenant's."""

    key_id: str
    tenant_id: str
    scopes: frozenset[str]
    expires_at: int | None = None
    """When the key expires, in milliseconds since 1970; none is never."""

    @classmethod
    def of(cls, key: ApiKey) -> "Caller":
        """Return the caller that holds this key."""
        return cls(key.id, key.tenant_id, frozenset(key.scopes), key.expires_at)

    @property
    def actor(self) -> str:
        """How job events name this caller."""
        return f"key:{self.key_id}"


async def authenticate(request: Request) -> Caller:
    """Return the caller of an API request, and count the request against the key's rate limit.

    Raises:
        ProblemError: there is no key, it is not valid, or it is used too often.
    """
    service = context_of(request)
    key = await check_key(service, await BEARER(request))
    # Bound here, in the request's own task, it is on every line that the endpoint and the middleware write.
    structlog.contextvars.bind_contextvars(key_id=key.id, tenant_id=key.tenant_id)
    _count(request, service, key)
    return Caller.of(key)


async def check_key(service: Context, credentials: HTTPAuthorizationCredentials | None) -> ApiKey:
    """Return the key that a request brings.

    Raises:
        ProblemError: there is no key, or it is not valid.
    """
    if credentials is None:
        raise ProblemError(
            "unauthorized",
            "Send an API key: 'Authorization: Bearer dq_live_...'.",
            headers={"WWW-Authenticate": "Bearer"},
        )

    async def look(token: str) -> ApiKey | None:
        return await anyio.to_thread.run_sync(service.keys.authenticate, token)

    key = await service.known_keys.get(credentials.credentials, look)
    if key is None or not is_live(key):
        raise ProblemError(
            "unauthorized",
            "This API key is not valid; it may be misspelt, revoked or expired.",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )
    return key


def _count(request: Request, service: Context, key: ApiKey) -> None:
    if service.limits is None:
        return
    verdict = service.limits.take(key.id)
    if not verdict.is_allowed:
        RATE_LIMITED.inc()
        detail = f"This key sends too many requests; try again in {verdict.retry_in_s} s."
        raise ProblemError("rate-limited", detail, headers=verdict.headers)
    # The middleware writes them: an endpoint's own response would not have them otherwise.
    request.state.extra_headers = verdict.headers


class NeedsScope(SecurityBase):
    """A dependency: the caller of a request, whose key has a scope. In the description it is the scheme of all keys.

    One and not a chain of small ones: FastAPI spends more on each dependency than most of them do.
    """

    model = BEARER.model
    scheme_name = BEARER.scheme_name

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def check(self, request: Request) -> None:
        """Find out who is asking, before anything else of the request is read.

        Raises:
            ProblemError: there is no key, it is not valid, is used too often, or lacks the scope.
        """
        caller = await authenticate(request)
        if self._scope not in caller.scopes:
            raise ProblemError("missing-scope", f"This API key lacks the scope {self._scope}; use one that has it.")
        request.state.caller = caller

    async def __call__(self, request: Request) -> Caller:
        """Return the caller that `check` found."""
        caller: Caller = request.state.caller
        return caller


def require_scopes(caller: Caller, scopes: Iterable[str]) -> None:
    """Refuse to let a caller hand out, in a key that it makes or gets the token of, what it may not do itself.

    Raises:
        ProblemError: some scope is not the caller's.
    """
    if lacking := sorted(set(scopes) - caller.scopes):
        raise ProblemError("missing-scope", f"This API key cannot give what it lacks: {', '.join(lacking)}.")


def require_lifetime(caller: Caller, expires_at: int | None) -> None:
    """Refuse to let a caller hand out, in a key that it makes or gets the token of, more time than it has itself.

    Raises:
        ProblemError: that key would outlive the caller's.
    """
    if caller.expires_at is not None and (expires_at is None or expires_at > caller.expires_at):
        until = datetime.fromtimestamp(caller.expires_at / 1000, UTC).isoformat(timespec="seconds")
        detail = f"expires_at must be {until} or earlier: this API key expires then, and gives no more time than it has"
        raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/expires_at", detail=detail)])


Reader = Annotated[Caller, Depends(NeedsScope("jobs:read"))]
Writer = Annotated[Caller, Depends(NeedsScope("jobs:write"))]
ArtifactReader = Annotated[Caller, Depends(NeedsScope("artifacts:read"))]
ArtifactWriter = Annotated[Caller, Depends(NeedsScope("artifacts:write"))]
BatchWriter = Annotated[Caller, Depends(NeedsScope("batches:write"))]
WebhookWriter = Annotated[Caller, Depends(NeedsScope("webhooks:write"))]
KeyAdmin = Annotated[Caller, Depends(NeedsScope("keys:admin"))]
QueueAdmin = Annotated[Caller, Depends(NeedsScope("queue:admin"))]
UsageReader = Annotated[Caller, Depends(NeedsScope("usage:read"))]
TenantAdmin = Annotated[Caller, Depends(NeedsScope("tenants:admin"))]


def _session_mac(service: Context, payload: str) -> str:
    # The pepper also hashes API keys; deriving a key of its own keeps one use from ever standing in for the other.
    pepper = service.settings.key_pepper.get_secret_value().encode()
    secret = hmac.digest(pepper, b"duquant dashboard session v1", hashlib.sha256)
    return hmac.new(secret, payload.encode(), hashlib.sha256).hexdigest()


def start_session(request: Request, response: Response, service: Context, key: ApiKey) -> None:
    """Put a signed session cookie for this key on the response. The key itself is not in it."""
    lifetime = service.settings.session_seconds
    facts = {"key": key.id, "tenant": key.tenant_id, "until": int(time.time()) + lifetime}
    payload = base64.urlsafe_b64encode(json.dumps(facts).encode()).decode()
    response.set_cookie(
        COOKIE,
        f"{payload}.{_session_mac(service, payload)}",
        max_age=lifetime,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def end_session(response: Response) -> None:
    """Take the session cookie away."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


def session_caller(request: Request, service: Context) -> Caller | None:
    """Return who is logged in to the dashboard; None when nobody is, or the key was revoked since."""
    payload, _, mac = request.cookies.get(COOKIE, "").rpartition(".")
    if not payload or not hmac.compare_digest(mac.encode(), _session_mac(service, payload).encode()):
        return None
    try:
        facts = json.loads(base64.urlsafe_b64decode(payload))
    except (binascii.Error, ValueError):  # signed by us, so only a changed format gets here
        return None
    if facts["until"] < time.time():
        return None
    try:
        key = service.keys.get(facts["key"], facts["tenant"])
    except KeyNotFound:
        return None
    return Caller.of(key) if is_live(key) else None


def is_live(key: ApiKey) -> bool:
    """Return whether a key is neither revoked nor expired."""
    now_ms = time.time() * 1000
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now_ms)


def check_same_site(request: Request) -> None:
    """Refuse a form post that another site sent.

    SameSite=Strict already keeps the cookie from such a request; this also stops logging someone in from elsewhere.

    Raises:
        ProblemError: the browser says that the request is not from our own pages.
    """
    fetch_site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if fetch_site is not None:
        is_own = fetch_site in ("same-origin", "none")
    elif origin is not None:
        is_own = urlsplit(origin).netloc == request.headers.get("host")
    else:
        is_own = False
    if not is_own:
        raise ProblemError("cross-site-request", "Send this form from the dashboard's own pages.")
