"""/v1/usage and /v1/quota: what a project has used, and what it may have."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from infra.database import read
from infra.job_quotas import holding
from infra.usage import UsageKey, UsageRow
from service.api_route import ApiRoute
from service.auth import Reader, UsageReader
from service.context import Service
from service.errors import ALWAYS, FieldProblem, ProblemError, responses
from service.openapi import shows
from service.schemas.common import Moment, milliseconds, moment
from service.schemas.usage import QuotaItem, QuotaView, UsageItem, UsageView

router = APIRouter(prefix="/v1", tags=["usage"], route_class=ApiRoute)


_USAGE = {
    "since": "2026-01-01T00:00:00.000Z",
    "until": "2026-01-05T09:30:00.000Z",
    "by": "model",
    "gpu_seconds": 913.5,
    "items": [
        {"key": "llama/7b", "gpu_seconds": 870.0, "jobs": 3},
        {"key": "smollm2-135m", "gpu_seconds": 43.5, "jobs": 2},
    ],
}
_QUOTA = {
    "tenant": "zoo",
    "weight": 2.0,
    "paused": False,
    "queued": {"used": 12, "limit": 500},
    "running": {"used": 8, "limit": 8},
    "bytes": {"used": 412_000_000_000, "limit": None},
}


@router.get(
    "/usage",
    operation_id="getUsage",
    summary="Read the bill",
    responses={200: shows(_USAGE), **responses(*ALWAYS, "validation-failed")},
)
def get_usage(
    service: Service,
    caller: UsageReader,
    by: Annotated[UsageKey, Query(description="What to add up by")] = "day",
    since: Annotated[Moment | None, Query(description="From when; left out, the first of this month (UTC)")] = None,
    until: Annotated[Moment | None, Query(description="Until before when; left out, now")] = None,
) -> UsageView:
    """Add up the GPU time of finished layers and evaluations, whatever became of their jobs."""
    until = until or datetime.now(UTC)
    since = since or until.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if since >= until:
        detail = "since must be before until"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="query", pointer="/since", detail=detail)]
        )
    span = {"since": milliseconds(since), "until": milliseconds(until)}
    return UsageView(
        since=since,
        until=until,
        by=by,
        gpu_seconds=service.usage.total_ms(caller.tenant_id, **span) / 1000,
        items=[_item(row, by) for row in service.usage.totals(caller.tenant_id, by=by, **span)],
    )


def _item(row: UsageRow, by: UsageKey) -> UsageItem:
    key = moment(int(row.key)).date().isoformat() if by == "day" else row.key
    return UsageItem(key=key, gpu_seconds=row.gpu_ms / 1000, jobs=row.jobs)


@router.get(
    "/quota",
    operation_id="getQuota",
    summary="Read this project's limits",
    responses={200: shows(_QUOTA), **responses(*ALWAYS)},
)
def get_quota(service: Service, caller: Reader) -> QuotaView:
    """Read what this project may have and what it has."""
    tenant = service.tenants.get(caller.tenant_id)
    with read(service.engine) as connection:
        has = holding(connection, tenant.id)
    return QuotaView(
        tenant=tenant.id,
        weight=tenant.weight,
        paused=tenant.paused,
        queued=QuotaItem(used=has.queued, limit=tenant.max_queued),
        running=QuotaItem(used=has.running, limit=tenant.max_running),
        bytes=QuotaItem(used=has.size_bytes, limit=tenant.max_bytes),
    )
