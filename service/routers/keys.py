"""/v1/keys and /v1/audit: who may ask, and who changed what."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Response

from infra import audit
from infra.audit import AuditEntry
from infra.keys import ApiKey
from service import idempotency
from service.api_route import ApiRoute
from service.auth import Caller, KeyAdmin, require_lifetime, require_scopes
from service.bodies import BODY_PROBLEMS, JSON_BODY, JSON_BODY_OR_NONE
from service.context import Context, Service
from service.errors import COMMON, responses
from service.idempotency import Made, Once
from service.openapi import shows, takes
from service.paging import Cursor, Limit, cut, read_cursor, write_cursor
from service.schemas.keys import KeyMade, KeyPage, KeyRequest, KeyRotation, KeyView, key_made, key_view
from service.schemas.tenants import AuditPage, audit_view

_ENTRY_CURSOR = "audit_"
"""In the place of an id: entries of the audit log have numbers."""
router = APIRouter(prefix="/v1", tags=["keys"], route_class=ApiRoute)

KEY_REQUEST = {"name": "ci", "scopes": ["jobs:read", "jobs:write"], "expires_at": "2036-01-05T09:30:00Z"}
KeyId = Annotated[str, Path(examples=["key_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_ONE = (*COMMON, "key-not-found")

KEY = {
    "id": "key_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "name": "ci",
    "prefix": "4fZq81Lw",
    "scopes": ["jobs:read", "jobs:write"],
    "state": "active",
    "created_at": "2026-01-05T09:30:00.000Z",
    "expires_at": "2026-07-05T00:00:00.000Z",
    "last_used_at": None,
    "revoked_at": None,
}
MADE = {**KEY, "token": "dq_live_..."}
_ENTRY = {
    "id": 12,
    "at": "2026-01-05T09:30:00.000Z",
    "actor": "key:key_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "action": "key.created",
    "target": KEY["id"],
    "data": {"name": "ci", "scopes": KEY["scopes"], "expires_at": None},
}


def make_key(service: Context, caller: Caller, tenant_id: str, body: KeyRequest) -> Made:
    """Make a key for a tenant. Its token is in the answer, never in the database."""
    require_scopes(caller, body.scopes)
    expires_at = None if body.expires_at is None else int(body.expires_at.timestamp() * 1000)
    require_lifetime(caller, expires_at)
    key, token = service.keys.create(tenant_id, body.name, body.scopes, expires_at=expires_at, actor=caller.actor)
    return _made(key, token)


def _made(key: ApiKey, token: str) -> Made:
    return Made(key_made(key, token), location=f"/v1/keys/{key.id}", kept=key_made(key, None))


@router.post(
    "/keys",
    operation_id="createKey",
    summary="Make an API key",
    status_code=201,
    response_model=KeyMade,
    dependencies=[JSON_BODY],
    responses={
        201: shows(MADE, "The key was made; its token is shown this once", headers=idempotency.HEADERS),
        **responses(*COMMON, *BODY_PROBLEMS, "quota-exceeded", *idempotency.PROBLEMS),
    },
    openapi_extra=takes(ci=KEY_REQUEST),
)
def create_key(service: Service, caller: KeyAdmin, body: KeyRequest, once: Once) -> Response:
    """Make a key of this project. It can allow no more than the key that makes it."""
    return once.answer(caller, lambda: None, lambda _: make_key(service, caller, caller.tenant_id, body))


@router.get(
    "/keys",
    operation_id="listKeys",
    summary="List API keys, newest first",
    responses={200: shows({"items": [KEY], "next_cursor": None}), **responses(*COMMON)},
)
def list_keys(service: Service, caller: KeyAdmin, limit: Limit = 50, cursor: Cursor = None) -> KeyPage:
    """List this project's keys by pages, with expired and revoked ones, without their tokens."""
    rows: Sequence[ApiKey] = service.keys.page(caller.tenant_id, limit=limit + 1, before=read_cursor(cursor, "key_"))
    page, next_cursor = cut(rows, limit)
    return KeyPage(items=[key_view(key) for key in page], next_cursor=next_cursor)


@router.get(
    "/keys/{key_id}",
    operation_id="getKey",
    summary="Read an API key",
    responses={200: shows(KEY), **responses(*_ONE)},
)
def get_key(service: Service, caller: KeyAdmin, key_id: KeyId) -> KeyView:
    """Read what is known of a key: its scopes, and when it was made, was used last and expires."""
    return key_view(service.keys.get(key_id, caller.tenant_id))


@router.post(
    "/keys/{key_id}:rotate",
    operation_id="rotateKey",
    summary="Replace an API key",
    status_code=201,
    response_model=KeyMade,
    dependencies=[JSON_BODY_OR_NONE],
    responses={
        201: shows(MADE, "The new key; its token is shown this once", headers=idempotency.HEADERS),
        **responses(*_ONE, *BODY_PROBLEMS, "key-conflict", *idempotency.PROBLEMS),
    },
    openapi_extra=takes(hour={"overlap_seconds": 3600}),
)
def rotate_key(
    service: Service, caller: KeyAdmin, key_id: KeyId, once: Once, body: KeyRotation | None = None
) -> Response:
    """Make a key with the same name, scopes and lifetime; the old one goes on working for the overlap.

    A key that expires gives no more time than it has: what it makes, in its own place too, ends when it would.
    """
    overlap = (body or KeyRotation()).overlap_seconds

    def check() -> None:
        old = service.keys.get(key_id, caller.tenant_id)
        require_scopes(caller, old.scopes)
        require_lifetime(caller, old.expires_at)

    def make(_: None) -> Made:
        key, token = service.keys.rotate(
            key_id, caller.tenant_id, overlap_seconds=overlap, actor=caller.actor, latest=caller.expires_at
        )
        return _made(key, token)

    answer = once.answer(caller, check, make)
    service.known_keys.forget()
    return answer


@router.post(
    "/keys/{key_id}:revoke",
    operation_id="revokeKey",
    summary="Revoke an API key",
    responses={200: shows({**KEY, "state": "revoked", "revoked_at": KEY["created_at"]}), **responses(*_ONE)},
)
def revoke_key(service: Service, caller: KeyAdmin, key_id: KeyId) -> KeyView:
    """Refuse a key from now on, for ever, and end the dashboard sessions that it began. Revoking twice is fine."""
    service.keys.revoke(key_id, caller.tenant_id, actor=caller.actor)
    service.known_keys.forget()
    return key_view(service.keys.get(key_id, caller.tenant_id))


@router.get(
    "/audit",
    operation_id="listAudit",
    summary="List the changes that were made, newest first",
    tags=["audit"],
    responses={200: shows({"items": [_ENTRY], "next_cursor": None}), **responses(*COMMON)},
)
def list_audit(service: Service, caller: KeyAdmin, limit: Limit = 50, cursor: Cursor = None) -> AuditPage:
    """List who changed this project, its limits, keys, webhooks, artifacts and texts. Jobs have events of their own.

    Whoever runs the server (`tenants:admin`) also sees who made, bounded, paused, resumed and deleted which queue.
    """
    before = read_cursor(cursor, _ENTRY_CURSOR)
    rows = audit.entries(
        service.engine,
        tenant_id=caller.tenant_id,
        with_server="tenants:admin" in caller.scopes,
        before=None if before is None else before[0],
        limit=limit + 1,
    )
    page: list[AuditEntry] = rows[:limit]
    next_cursor = write_cursor(page[-1].id, _ENTRY_CURSOR) if len(rows) > limit else None
    return AuditPage(items=[audit_view(entry) for entry in page], next_cursor=next_cursor)
