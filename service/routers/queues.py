"""/v1/queues, /v1/workers, /v1/failures: what waits, what works, what went wrong."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Response

from infra.jobs import Worker
from infra.queues import Queue
from service.api_route import ApiRoute
from service.auth import QueueAdmin, Reader
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import ALWAYS, COMMON, ProblemError, responses
from service.openapi import header, shows, takes
from service.routers.health import BEAT_SECONDS
from service.schemas.common import moment
from service.schemas.jobs import QUEUE_NAME
from service.schemas.queues import (
    FailureList,
    FailureView,
    QueueList,
    QueueRequest,
    QueueView,
    WorkerList,
    WorkerView,
)

router = APIRouter(prefix="/v1", tags=["queues"], route_class=ApiRoute)

QueuePath = Annotated[str, Path(examples=["default"])]
NewQueuePath = Annotated[str, Path(pattern=QUEUE_NAME, examples=["express"])]
OnlyNew = Annotated[
    str | None,
    Header(alias="If-None-Match", max_length=1000, description="`*` only makes the queue: if it is there, a 412"),
]
OnlyOld = Annotated[
    str | None,
    Header(alias="If-Match", max_length=1000, description="`*` only changes the queue: if it is not there, a 412"),
]

_ONE_QUEUE = (*ALWAYS, "validation-failed", "queue-not-found")
_QUEUE = {
    "name": "default",
    "paused": False,
    "max_running": None,
    "waiting": 3,
    "running": 1,
    "busy": 2,
    "oldest_wait_seconds": 41.5,
}
_MADE = {
    **_QUEUE,
    "name": "express",
    "max_running": 4,
    "waiting": 0,
    "running": 0,
    "busy": 0,
    "oldest_wait_seconds": None,
}
_WORKER = {
    "name": "node-1:4711",
    "started_at": "2026-01-05T08:00:00.000Z",
    "seen_at": "2026-01-05T09:30:12.000Z",
    "executor": "ray",
    "device": "cuda",
    "slots": 8,
    "running": 1,
}
_FAILURE = {
    "kind": "quantize",
    "reason": "bad_input",
    "count": 2,
    "latest_at": "2026-01-05T09:31:00.000Z",
    "latest_job_id": "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "latest_detail": "model-00002-of-00004.safetensors is truncated",
}


def _expected(if_none_match: str | None, if_match: str | None) -> bool | None:
    """Return whether the queue has to be there already, or must not be; none where either will do."""
    is_new, is_old = ((each or "").strip() == "*" for each in (if_none_match, if_match))
    if if_match is not None and (is_new or not is_old):
        raise ProblemError("precondition-failed", "Queues have no ETags; `If-Match: *` is for one that is there.")
    return True if is_old else False if is_new else None


def _view(queue: Queue) -> QueueView:
    return QueueView(
        name=queue.name,
        paused=queue.paused,
        max_running=queue.max_running,
        waiting=queue.waiting,
        running=queue.running,
        busy=queue.busy,
        oldest_wait_seconds=None if queue.oldest_wait_ms is None else max(queue.oldest_wait_ms, 0) / 1000,
    )


@router.get(
    "/queues",
    operation_id="listQueues",
    summary="List the queues",
    responses={200: shows({"items": [_QUEUE]}), **responses(*ALWAYS)},
)
def list_queues(service: Service, caller: Reader) -> QueueList:
    """List every queue, with this project's jobs in it."""
    return QueueList(items=[_view(queue) for queue in service.queues.list(caller.tenant_id)])


@router.get(
    "/queues/{queue}",
    operation_id="getQueue",
    summary="Read a queue",
    responses={200: shows(_QUEUE), **responses(*_ONE_QUEUE)},
)
def get_queue(service: Service, caller: Reader, queue: QueuePath) -> QueueView:
    """Read one queue, with this project's jobs in it."""
    return _view(service.queues.get(queue, caller.tenant_id))


@router.put(
    "/queues/{queue}",
    operation_id="putQueue",
    summary="Make or change a queue",
    response_model=QueueView,
    dependencies=[JSON_BODY],
    responses={
        200: shows(_MADE, "The queue was there and has this bound now"),
        201: shows(_MADE, "The queue was made", headers={"Location": header("The path of the queue")}, model=QueueView),
        # Not found is a name that cannot be part of a path, such as one with a control character.
        **responses(*COMMON, *BODY_PROBLEMS, "not-found", "precondition-failed", "quota-exceeded"),
    },
    openapi_extra=takes(bounded={"max_running": 4}, unbounded={"max_running": None}),
)
def put_queue(
    service: Service,
    caller: QueueAdmin,
    queue: NewQueuePath,
    body: QueueRequest,
    response: Response,
    if_none_match: OnlyNew = None,
    if_match: OnlyOld = None,
) -> QueueView:
    """Make a queue, or set how much of it may run at once. What runs goes on; a paused queue stays paused."""
    exists = _expected(if_none_match, if_match)
    if service.queues.put(queue, max_running=body.max_running, actor=caller.actor, exists=exists):
        response.status_code = 201
        response.headers["Location"] = f"/v1/queues/{queue}"
    return _view(service.queues.get(queue, caller.tenant_id))


@router.delete(
    "/queues/{queue}",
    operation_id="deleteQueue",
    summary="Delete a queue",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is gone"}, **responses(*_ONE_QUEUE, "queue-conflict")},
)
def delete_queue(service: Service, caller: QueueAdmin, queue: QueuePath) -> Response:
    """Delete a queue in which no job of any project waits or runs. Jobs that have ended keep its name."""
    service.queues.delete(queue, actor=caller.actor)
    return Response(status_code=204)


@router.post(
    "/queues/{queue}:pause",
    operation_id="pauseQueue",
    summary="Pause a queue",
    responses={200: shows({**_QUEUE, "paused": True}, "No more of its jobs start"), **responses(*_ONE_QUEUE)},
)
def pause_queue(service: Service, caller: QueueAdmin, queue: QueuePath) -> QueueView:
    """Start no more jobs of this queue, of any project. What runs goes on. Doing it twice is fine."""
    service.queues.pause(queue, actor=caller.actor)
    return _view(service.queues.get(queue, caller.tenant_id))


@router.post(
    "/queues/{queue}:resume",
    operation_id="resumeQueue",
    summary="Resume a queue",
    responses={200: shows(_QUEUE, "Its jobs start again"), **responses(*_ONE_QUEUE)},
)
def resume_queue(service: Service, caller: QueueAdmin, queue: QueuePath) -> QueueView:
    """Start this queue's jobs again. Doing it twice is fine."""
    service.queues.resume(queue, actor=caller.actor)
    return _view(service.queues.get(queue, caller.tenant_id))


@router.get(
    "/workers",
    operation_id="listWorkers",
    summary="List the dispatchers",
    responses={200: shows({"items": [_WORKER]}), **responses(*ALWAYS)},
)
def list_workers(service: Service, _caller: QueueAdmin) -> WorkerList:
    """List the dispatchers that have reported within the last minute."""
    held = service.search.held_by_owner()
    live = service.jobs.live_workers(BEAT_SECONDS)
    return WorkerList(items=[_worker(worker, held.get(worker.owner, 0)) for worker in live])


def _worker(worker: Worker, running: int) -> WorkerView:
    info = worker.info
    return WorkerView(
        name=worker.owner,
        started_at=moment(worker.started_at),
        seen_at=moment(worker.beat_at),
        executor=info.get("executor"),
        device=info.get("device"),
        slots=info.get("slots"),
        running=running,
    )


@router.get(
    "/failures",
    operation_id="listFailures",
    summary="List dead letters by reason",
    responses={200: shows({"items": [_FAILURE]}), **responses(*ALWAYS)},
)
def list_failures(service: Service, caller: Reader) -> FailureList:
    """Group this project's failed jobs by kind and reason. A retried job is no longer among them."""
    groups = service.jobs.failures(caller.tenant_id)
    return FailureList(
        items=[
            FailureView(
                kind=group.kind,
                reason=group.reason,
                count=group.count,
                latest_at=moment(group.latest_at),
                latest_job_id=group.latest_job_id,
                latest_detail=group.latest_detail,
            )
            for group in groups
        ]
    )
