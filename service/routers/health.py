"""/healthz, /readyz, /version: for probes and operators; no key needed."""

import platform
from collections.abc import Callable
from importlib.metadata import version

import anyio
import structlog
from fastapi import APIRouter, Request, Response

from duquant.config import ALGORITHM_VERSION
from infra.errors import DiskFull, InfraError, TransientError
from infra.probe import check_database
from service.context import Context, Service
from service.errors import responses
from service.openapi import Description, shows
from service.schemas.health import Check, Health, Readiness, Version

log = structlog.get_logger(__name__)

router = APIRouter(tags=["health"])

BEAT_SECONDS = 60.0
"""A dispatcher that has been silent for longer is taken for dead."""

_ALL_WELL = {
    "database": {"ok": True, "detail": "answers"},
    "storage": {"ok": True, "detail": "answers"},
    "dispatcher": {"ok": True, "detail": "2 reporting"},
    "webhooks": {"ok": True, "detail": "sending"},
}
_READY = {"ready": True, "checks": _ALL_WELL}
_NOT_READY = {
    "ready": False,
    "checks": {
        **_ALL_WELL,
        "dispatcher": {"ok": False, "detail": "no dispatcher has reported within 60 s; start `python -m workers`"},
    },
}


@router.get(
    "/healthz",
    operation_id="getHealth",
    summary="Is the process up?",
    responses={200: {"content": {"application/json": {"example": {"status": "ok"}}}}, **responses("internal-error")},
)
async def get_health() -> Health:
    """Answer without touching anything else."""
    return Health()


@router.get(
    "/readyz",
    operation_id="getReadiness",
    summary="Can the service do its work?",
    responses={
        200: shows(_READY, "All parts work"),
        503: {
            "model": Readiness,
            "description": "Some part is down; `checks` names it",
            "content": {"application/json": {"example": _NOT_READY}},
        },
        **responses("internal-error"),
    },
)
async def get_readiness(service: Service, response: Response) -> Readiness:
    """Check the database, the object store and the dispatchers, and name what is down."""
    checks = await service.readiness.get(lambda: _check_all(service))
    ready = all(each.ok for each in checks.values())
    response.status_code = 200 if ready else 503
    return Readiness(ready=ready, checks=checks)


async def _check_all(service: Context) -> dict[str, Check]:
    """Check all parts at the same time: a probe has little patience, and what is down takes seconds to say so."""
    found: dict[str, Check] = {}

    async def run(name: str, check: Callable[[Context], Check]) -> None:
        found[name] = await anyio.to_thread.run_sync(_run, name, check, service)

    async with anyio.create_task_group() as group:
        for name, check in _CHECKS.items():
            group.start_soon(run, name, check)
    return {name: found[name] for name in _CHECKS}


def _run(name: str, check: Callable[[Context], Check], service: Context) -> Check:
    try:
        return check(service)
    except InfraError as error:
        # Anyone may ask for readiness: addresses and driver messages go to the log only.
        log.warning("not_ready", part=name, error=str(error))
        return Check(ok=False, detail=f"{_in_short(error)}; the server's log says more")


def _in_short(error: InfraError) -> str:
    match error:
        case DiskFull():
            return "its disk is full"
        case TransientError():
            return "does not answer"
    return "refuses to work"


def _database(service: Context) -> Check:
    check_database(service.engine)
    return Check(ok=True, detail="answers")


def _storage(service: Context) -> Check:
    service.storage.check()
    return Check(ok=True, detail="answers")


def _dispatcher(service: Context) -> Check:
    count = len(service.jobs.live_workers(BEAT_SECONDS))
    if count == 0:
        detail = f"no dispatcher has reported within {BEAT_SECONDS:.0f} s; start `python -m workers`"
        return Check(ok=False, detail=detail)
    return Check(ok=True, detail=f"{count} reporting")


def _webhooks(service: Context) -> Check:
    if service.webhook_sender is None or service.webhook_sender.done():
        return Check(ok=False, detail="the sender has stopped; restart the service, its log says why")
    return Check(ok=True, detail="sending")


_CHECKS = {"database": _database, "storage": _storage, "dispatcher": _dispatcher, "webhooks": _webhooks}


@router.get("/openapi.json", include_in_schema=False)
def get_description(request: Request) -> Response:
    """Describe the API. Not a coroutine: the first time takes a second, which others must not wait for."""
    description = request.app.state.description
    assert isinstance(description, Description)
    return Response(description.as_json(), media_type="application/json")


@router.get(
    "/version",
    operation_id="getVersion",
    summary="What is running?",
    responses={
        200: {
            "content": {"application/json": {"example": {"version": "0.1.0", "algorithm_version": 1, "python": "3.11"}}}
        },
        **responses("internal-error"),
    },
)
async def get_version() -> Version:
    """Name the versions of the package, the algorithm and Python."""
    return Version(version=version("duquant"), algorithm_version=ALGORITHM_VERSION, python=platform.python_version())
