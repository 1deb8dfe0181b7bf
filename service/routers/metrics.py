"""/metrics: for Prometheus."""

import time
from ipaddress import ip_address
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from infra.errors import InfraError
from infra.metrics import Families, collected, merge
from service.auth import BEARER, check_key
from service.context import Context, Service
from service.errors import ALWAYS, ProblemError, responses

log = structlog.get_logger(__name__)

router = APIRouter(tags=["health"])

_SHOWN = """# HELP duquant_queue_depth Jobs that wait for a dispatcher
# TYPE duquant_queue_depth gauge
duquant_queue_depth{queue="default"} 3.0
"""


def _is_from_here(request: Request) -> bool:
    """Whether this machine itself asks, and not a proxy on it for somebody else."""
    names = request.headers.keys()
    if {"forwarded", "x-real-ip", "via"} & set(names) or any(name.startswith("x-forwarded-") for name in names):
        return False
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def _may_read(
    request: Request,
    service: Service,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
) -> None:
    """Let in whom the setting lets in; a key of the server's operator always."""
    access = service.settings.metrics_access
    if access == "open" or (access == "loopback" and credentials is None and _is_from_here(request)):
        return
    key = await check_key(service, credentials)
    if "tenants:admin" not in key.scopes:
        raise ProblemError("missing-scope", "Metrics tell of all projects: use a key with the scope tenants:admin.")


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    dependencies=[Depends(_may_read)],
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"example": _SHOWN}}},
        **responses(*ALWAYS),
    },
)
def get_metrics(service: Service) -> Response:
    """Show what the API processes on this port, the dispatchers and the database count.

    Without a key it answers this machine only, unless DUQUANT_METRICS_ACCESS says otherwise.
    """
    families = merge([collected(), _from_database(service)])
    return Response(generate_latest(Families(families)), media_type=CONTENT_TYPE_LATEST)


def _from_database(service: Context) -> list[Metric]:
    """Read what the database knows. When it is down, that is itself a metric, and the rest is shown all the same."""
    started = time.perf_counter()
    try:
        found, is_up = service.queue_metrics.collect(), True
    except InfraError as error:
        log.warning("metrics_incomplete", error=str(error))
        found, is_up = [], False
    seconds = time.perf_counter() - started
    return [
        *found,
        GaugeMetricFamily("duquant_database_up", "Whether the database answered this scrape", value=float(is_up)),
        GaugeMetricFamily("duquant_scrape_seconds", "Time to read the metrics from the database", value=seconds),
    ]
