"""/v1/queues, /v1/workers, /v1/failures: what waits, what works, what went wrong."""

from typing import Annotated

from fastapi import APIRouter, Path

from infra.jobs import Worker
from infra.queues import Queue
from service.api_route import ApiRoute
from service.auth import QueueAdmin, Reader
from service.context import Service
from service.errors import ALWAYS, responses
from service.openapi import shows
from service.routers.health import BEAT_SECONDS
from service.schemas.common import moment
from service.schemas.queues import FailureList, FailureView, QueueList, QueueView, WorkerList, WorkerView

router = APIRouter(prefix="/v1", tags=["queues"], route_class=ApiRoute)

QueuePath = Annotated[str, Path(max_length=64, examples=["default"])]

_ONE_QUEUE = (*ALWAYS, "validation-failed", "queue-not-found")
_QUEUE = {
    "name": "default",
    "paused": False,
    "max_running": None,
    "waiting": 3,
    "running": 1,
    "oldest_wait_seconds": 41.5,
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


def _view(queue: Queue) -> QueueView:
    return QueueView(
        name=queue.name,
        paused=queue.paused,
        max_running=queue.max_running,
        waiting=queue.waiting,
        running=queue.running,
        oldest_wait_seconds=None if queue.oldest_wait_ms is None else max(queue.oldest_wait_ms, 0) / 1000,
    )


@router.get(
    "/queues",
    operation_id="listQueues",
    summary="List the queues",
    responses={200: shows({"items": [_QUEUE]}), **responses(*ALWAYS)},
)
def list_queues(service: Service, caller: Reader) -> QueueList:
    """List every queue, with this tenant's jobs in it."""
    return QueueList(items=[_view(queue) for queue in service.queues.list(caller.tenant_id)])


@router.get(
    "/queues/{queue}",
    operation_id="getQueue",
    summary="Read a queue",
    responses={200: shows(_QUEUE), **responses(*_ONE_QUEUE)},
)
def get_queue(service: Service, caller: Reader, queue: QueuePath) -> QueueView:
    """Read one queue, with this tenant's jobs in it."""
    return _view(service.queues.get(queue, caller.tenant_id))


@router.post(
    "/queues/{queue}:pause",
    operation_id="pauseQueue",
    summary="Pause a queue",
    responses={200: shows({**_QUEUE, "paused": True}, "No more of its jobs start"), **responses(*_ONE_QUEUE)},
)
def pause_queue(service: Service, caller: QueueAdmin, queue: QueuePath) -> QueueView:
    """Start no more jobs of this queue, of any tenant. What runs goes on. Doing it twice is fine."""
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
    """Group this tenant's failed jobs by kind and reason. A retried job is no longer among them."""
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
