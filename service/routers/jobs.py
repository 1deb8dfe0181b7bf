"""/v1/jobs: submit, list, read, cancel, follow."""

import base64
import binascii
import hashlib
import json
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from infra.jobs import JobState
from service import stream
from service.auth import Reader, Writer
from service.context import Context, context
from service.errors import FieldProblem, ProblemError, responses
from service.examples import EVENT_STREAM, JOB, JOB_REQUESTS
from service.schemas.jobs import JobDetail, JobPage, JobRequest, JobSubmitted, LayerList
from service.submit import new_job
from service.views import job_detail, job_summary, layer_view

router = APIRouter(prefix="/v1", tags=["jobs"])

Service = Annotated[Context, Depends(context)]
JobId = Annotated[str, Path(max_length=64, examples=["job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_COMMON = ("unauthorized", "missing-scope", "validation-failed", "internal-error", "service-unavailable")
_ONE_JOB = (*_COMMON, "job-not-found")


def _is_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError("unsupported-media-type", f"The body's content type is {media_type!r}.")


@router.post(
    "/jobs",
    operation_id="submitJob",
    summary="Submit a quantization job",
    status_code=201,
    dependencies=[Depends(_is_json)],
    responses={
        200: {"model": JobSubmitted, "description": "A job for the same model and recipe was there; it is returned"},
        201: {
            "description": "The job was made; Location names it",
            "content": {"application/json": {"example": {**JOB, "reused": False}}},
        },
        **responses(
            *_COMMON,
            "malformed-request",
            "body-too-large",
            "unsupported-media-type",
            "model-forbidden",
            "model-not-found",
            "text-forbidden",
            "text-not-found",
        ),
    },
    openapi_extra={"requestBody": {"content": {"application/json": {"examples": JOB_REQUESTS}}}},
)
def submit_job(service: Service, caller: Writer, body: JobRequest, response: Response) -> JobSubmitted:
    """Queue a job that quantizes one model with one recipe.

    The same model and recipe again gives back the job that is active or finished, with `reused: true` and status 200,
    unless `force` is set.
    """
    job, created = service.jobs.enqueue(new_job(service, caller, body), force=body.force, actor=caller.actor)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobSubmitted(**job_detail(service, job).model_dump(), reused=not created)


@router.get(
    "/jobs",
    operation_id="listJobs",
    summary="List jobs, newest first",
    responses={
        200: {"content": {"application/json": {"example": {"items": [], "next_cursor": None}}}},
        **responses(*_COMMON),
    },
)
def list_jobs(
    service: Service,
    caller: Reader,
    state: Annotated[JobState | None, Query(description="Only jobs in this state")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Most jobs on a page")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")] = None,
) -> JobPage:
    """List this tenant's jobs by pages. A page stays right when jobs are added meanwhile."""
    before = _read_cursor(cursor) if cursor is not None else None
    jobs = service.jobs.list(caller.tenant_id, state=state, limit=limit + 1, before=before)
    page = jobs[:limit]
    next_cursor = _write_cursor(page[-1].created_at, page[-1].id) if len(jobs) > limit else None
    return JobPage(items=[job_summary(job) for job in page], next_cursor=next_cursor)


@router.get(
    "/jobs/{job_id}",
    operation_id="getJob",
    summary="Read a job",
    response_model=JobDetail,
    responses={
        200: {
            "headers": {"ETag": {"description": "Changes with the job", "schema": {"type": "string"}}},
            "content": {"application/json": {"example": JOB}},
        },
        304: {"description": "The job is as If-None-Match knows it"},
        **responses(*_ONE_JOB),
    },
)
def get_job(
    service: Service,
    caller: Reader,
    job_id: JobId,
    response: Response,
    if_none_match: Annotated[str | None, Header(description="The ETag of the answer before")] = None,
) -> JobDetail | Response:
    """Read a job's state, progress, place in the queue and estimated time left."""
    job = service.jobs.get(job_id, caller.tenant_id)
    detail = job_detail(service, job)
    # Everything shown but the estimate, which changes with the clock alone.
    shown = detail.model_dump_json(exclude={"eta_seconds"})
    etag = f'"{hashlib.sha256(shown.encode()).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if not job.state.is_terminal:
        headers["Retry-After"] = "2"
    if if_none_match is not None and _matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return detail


@router.post(
    "/jobs/{job_id}:cancel",
    operation_id="cancelJob",
    summary="Cancel a job",
    response_model=JobDetail,
    responses={
        200: {"description": "The job is cancelled", "content": {"application/json": {"example": JOB}}},
        202: {"model": JobDetail, "description": "The job is running; it stops at the next beat"},
        **responses(*_ONE_JOB, "job-conflict"),
    },
)
def cancel_job(service: Service, caller: Writer, job_id: JobId, response: Response) -> JobDetail:
    """Cancel a job that has not ended. Cancelling twice is fine; a job that succeeded or failed is a conflict."""
    job = service.jobs.get(job_id, caller.tenant_id)
    if job.state not in (JobState.CANCELLED, JobState.CANCELLING):
        job = service.jobs.cancel(job_id, tenant_id=caller.tenant_id, actor=caller.actor)
    response.status_code = 200 if job.state is JobState.CANCELLED else 202
    return job_detail(service, job)


@router.get(
    "/jobs/{job_id}/layers",
    operation_id="listJobLayers",
    summary="List a job's layers",
    responses={200: {"content": {"application/json": {"example": {"items": []}}}}, **responses(*_ONE_JOB)},
)
def list_job_layers(service: Service, caller: Reader, job_id: JobId) -> LayerList:
    """List the layers in order, with state, error and time. Empty until the job has been planned."""
    job = service.jobs.get(job_id, caller.tenant_id)
    return LayerList(items=[layer_view(row) for row in service.jobs.layers(job.id)])


@router.get(
    "/jobs/{job_id}/events",
    operation_id="followJob",
    summary="Follow a job (server-sent events)",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Events as they happen; an `end` event after the last",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENT_STREAM}},
        },
        **responses(*_ONE_JOB),
    },
)
def follow_job(
    service: Service,
    caller: Reader,
    job_id: JobId,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event seen; what came after follows")
    ] = None,
) -> StreamingResponse:
    """Stream the job's events from the first, or from after Last-Event-ID, until it ends."""
    job = service.jobs.get(job_id, caller.tenant_id)
    return stream.respond(stream.job_events(service, job.id, _event_number(last_event_id)))


def _event_number(text: str | None) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", text):
        detail = "Last-Event-ID must be the id of an event, a whole number"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="header", pointer="/Last-Event-ID", detail=detail)]
        )
    return int(text)


def _matches(if_none_match: str, etag: str) -> bool:
    candidates = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in candidates or etag in candidates


def _write_cursor(created_at: int, job_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created_at, job_id]).encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[int, str]:
    """Take a cursor apart. It only moves within the caller's own jobs, so it needs no signature."""
    try:
        created_at, job_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        is_good = type(created_at) is int and abs(created_at) < 2**62 and isinstance(job_id, str)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        is_good = False
    if not is_good or "\0" in job_id or not job_id.isascii():
        detail = "cursor must be the next_cursor of the page before"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="query", pointer="/cursor", detail=detail)]
        )
    return created_at, job_id
