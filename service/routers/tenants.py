"""/v1/tenants: the projects of this server, for whoever runs it."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from service import idempotency
from service.api_route import ApiRoute
from service.auth import TenantAdmin
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import COMMON, responses
from service.idempotency import Made, Once
from service.openapi import shows, takes
from service.paging import Cursor, Limit, cut, read_cursor
from service.routers.keys import KEY_REQUEST, MADE, make_key
from service.schemas.keys import KeyMade, KeyRequest
from service.schemas.tenants import TenantChange, TenantPage, TenantRequest, TenantView, tenant_view

router = APIRouter(prefix="/v1", tags=["tenants"], route_class=ApiRoute)

TenantId = Annotated[str, Path(examples=["zoo"])]

_ONE = (*COMMON, "tenant-not-found")
_TENANT = {
    "id": "zoo",
    "name": "Model zoo",
    "created_at": "2026-01-05T09:30:00.000Z",
    "weight": 2.0,
    "max_queued": 500,
    "max_running": 8,
    "max_bytes": 2_000_000_000_000,
    "paused": False,
}


@router.post(
    "/tenants",
    operation_id="createTenant",
    summary="Make a project",
    status_code=201,
    response_model=TenantView,
    dependencies=[JSON_BODY],
    responses={
        201: shows(_TENANT, "The project was made", headers=idempotency.HEADERS),
        **responses(*COMMON, *BODY_PROBLEMS, "tenant-exists", *idempotency.PROBLEMS),
    },
    openapi_extra=takes(zoo={"id": "zoo", "name": "Model zoo", "weight": 2.0, "max_queued": 500}),
)
def create_tenant(service: Service, caller: TenantAdmin, body: TenantRequest, once: Once) -> Response:
    """Make a project with its limits. It needs a key of its own next: `POST /v1/tenants/{id}/keys`."""

    def make(_: None) -> Made:
        tenant = service.tenants.create(body.id, actor=caller.actor, **body.changes())
        return Made(tenant_view(tenant), location=f"/v1/tenants/{tenant.id}")

    return once.answer(caller, lambda: None, make)


@router.get(
    "/tenants",
    operation_id="listTenants",
    summary="List projects, newest first",
    responses={200: shows({"items": [_TENANT], "next_cursor": None}), **responses(*COMMON)},
)
def list_tenants(service: Service, _caller: TenantAdmin, limit: Limit = 50, cursor: Cursor = None) -> TenantPage:
    """List all projects of this server by pages."""
    page, next_cursor = cut(service.tenants.page(limit=limit + 1, before=read_cursor(cursor, None)), limit)
    return TenantPage(items=[tenant_view(tenant) for tenant in page], next_cursor=next_cursor)


@router.get(
    "/tenants/{tenant_id}",
    operation_id="getTenant",
    summary="Read a project",
    responses={200: shows(_TENANT), **responses(*_ONE)},
)
def get_tenant(service: Service, _caller: TenantAdmin, tenant_id: TenantId) -> TenantView:
    """Read a project's limits."""
    return tenant_view(service.tenants.get(tenant_id))


@router.patch(
    "/tenants/{tenant_id}",
    operation_id="changeTenant",
    summary="Change a project",
    dependencies=[JSON_BODY],
    responses={200: shows(_TENANT), **responses(*_ONE, *BODY_PROBLEMS)},
    openapi_extra=takes(quota={"max_running": 8, "max_bytes": None}),
)
def change_tenant(service: Service, caller: TenantAdmin, tenant_id: TenantId, body: TenantChange) -> TenantView:
    """Change a project's name, weight and limits, or pause it. Jobs that wait or run already are left alone."""
    return tenant_view(service.tenants.change(tenant_id, actor=caller.actor, **body.changes()))


@router.post(
    "/tenants/{tenant_id}/keys",
    operation_id="createTenantKey",
    summary="Make an API key of a project",
    status_code=201,
    response_model=KeyMade,
    dependencies=[JSON_BODY],
    responses={
        201: shows(MADE, "The key was made; its token is shown this once", headers=idempotency.HEADERS),
        **responses(*_ONE, *BODY_PROBLEMS, "quota-exceeded", *idempotency.PROBLEMS),
    },
    openapi_extra=takes(ci=KEY_REQUEST),
)
def create_tenant_key(
    service: Service, caller: TenantAdmin, tenant_id: TenantId, body: KeyRequest, once: Once
) -> Response:
    """Make the first key of a project; with `keys:admin` it can make the others itself."""
    return once.answer(
        caller, lambda: service.tenants.get(tenant_id), lambda tenant: make_key(service, caller, tenant.id, body)
    )
