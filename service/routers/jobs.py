"""/v1/jobs: submit, list, read, cancel, follow."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Path, Response
from fastapi.responses import StreamingResponse

from infra.errors import JobChanged, QueueNotFound
from infra.job_search import JobFilter
from infra.jobs import Job, JobState, NewJob
from service import conditions, idempotency, stream
from service.api_route import ApiRoute
from service.auth import Reader, Writer
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.conditions import IfMatch, IfNoneMatch
from service.context import Context, Service
from service.errors import COMMON, FieldProblem, ProblemError, responses
from service.evaluate import check_settings, of_artifact
from service.examples import EVENT_STREAM, JOB, JOB_CHANGES, JOB_PAGE, JOB_REQUESTS, LAYERS
from service.filters import job_filter
from service.idempotency import Made, Once
from service.openapi import shows
from service.paging import Cursor, Limit, cut, read_cursor
from service.preferences import Prefer, Wait, wait_seconds
from service.schemas.jobs import JobChange, JobDetail, JobPage, JobRequest, JobSubmitted, LayerList
from service.submit import Identities, changes_of, new_job
from service.views import job_detail, job_submitted, job_summary, layer_view

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=ApiRoute)

JobId = Annotated[str, Path(examples=["job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_ONE_JOB = (*COMMON, "job-not-found")


@contextmanager
def _queue_of_the_body() -> Iterator[None]:
    """Take a queue that is not there for what it is: a field with a wrong value."""
    try:
        yield
    except QueueNotFound as error:
        raise ProblemError(
            "validation-failed", str(error), [FieldProblem(pointer="/queue", detail=str(error))]
        ) from error


@router.post(
    "/jobs",
    operation_id="submitJob",
    summary="Submit a quantization job",
    status_code=201,
    response_model=JobSubmitted,
    dependencies=[JSON_BODY],
    responses={
        200: {
            "model": JobSubmitted,
            "description": "A job for the same model and recipe was there; it is returned",
            "headers": idempotency.HEADERS,
            "content": {"application/json": {"example": {**JOB, "reused": True}}},
        },
        201: {
            "description": "The job was made; Location names it",
            "headers": idempotency.HEADERS,
            "content": {"application/json": {"example": {**JOB, "reused": False}}},
        },
        **responses(
            *COMMON,
            *BODY_PROBLEMS,
            "job-conflict",
            "dependency-failed",
            "dependency-not-found",
            "quota-exceeded",
            "model-forbidden",
            "model-not-found",
            "text-forbidden",
            "text-not-found",
            *idempotency.PROBLEMS,
        ),
    },
    openapi_extra={"requestBody": {"content": {"application/json": {"examples": JOB_REQUESTS}}}},
)
def submit_job(service: Service, caller: Writer, body: JobRequest, once: Once) -> Response:
    """Queue a job that quantizes one model with one recipe.

    The same model and recipe again gives back the job that is active or finished, with `reused: true` and status 200,
    unless `force` is set. A job that still waits then serves both requests: it starts as early and as urgently as the
    more impatient of them wants, and leaves a paused queue for the one of the new request, if that is not paused, and a
    full one for one without a bound.
    """

    def prepare() -> tuple[NewJob, Identities | None]:
        new = new_job(service, caller, body)
        settings = body.evaluate
        return new, None if settings is None else check_settings(service, caller, settings, "/evaluate")

    def make(prepared: tuple[NewJob, Identities | None]) -> Made:
        new, identities = prepared
        with _queue_of_the_body():
            job, created = service.jobs.enqueue(new, force=body.force, actor=caller.actor)
        evaluation = None
        if body.evaluate is not None and identities is not None:
            # In the queue that was asked for: that of a job which was there already may be gone.
            measuring = replace(of_artifact(job, body.evaluate, identities), priority=job.priority, queue=new.queue)
            evaluation, _ = service.jobs.enqueue(measuring, actor=caller.actor)
        evaluation_id = None if evaluation is None else evaluation.id
        view = job_submitted(service, job, created=created, evaluation_job_id=evaluation_id)
        return Made(view, status=201 if created else 200, location=f"/v1/jobs/{job.id}")

    return once.answer(caller, prepare, make)


@router.get(
    "/jobs",
    operation_id="listJobs",
    summary="List jobs, newest first",
    responses={200: shows(JOB_PAGE), **responses(*COMMON)},
)
def list_jobs(
    service: Service,
    caller: Reader,
    wanted: Annotated[JobFilter, Depends(job_filter)],
    limit: Limit = 50,
    cursor: Cursor = None,
) -> JobPage:
    """List this project's jobs by pages. A page stays right when jobs are added meanwhile."""
    jobs = service.search.page(caller.tenant_id, wanted, limit=limit + 1, before=read_cursor(cursor, "job_"))
    page, next_cursor = cut(jobs, limit)
    return JobPage(items=[job_summary(job) for job in page], next_cursor=next_cursor)


@router.get(
    "/jobs/{job_id}",
    operation_id="getJob",
    summary="Read a job",
    response_model=JobDetail,
    responses={
        200: {
            "headers": {
                **conditions.HEADER,
                "Retry-After": {
                    "description": "When to ask again, while it has not ended",
                    "schema": {"type": "string"},
                },
                "Preference-Applied": {
                    "description": "Set when the answer was held back",
                    "schema": {"type": "string"},
                },
            },
            "content": {"application/json": {"example": JOB}},
        },
        304: {"description": "The job is as If-None-Match knows it"},
        **responses(*_ONE_JOB),
    },
)
async def get_job(
    service: Service,
    caller: Reader,
    job_id: JobId,
    if_none_match: IfNoneMatch = None,
    prefer: Prefer = None,
) -> Response:
    """Read a job's state, progress, place in the queue and estimated time left.

    With `Prefer: wait=N` the answer comes when the job has ended, or when it differs from what `If-None-Match` knows,
    or after N seconds.
    """
    # An answer that is held back costs what an open stream does. A preference that cannot be met is no error.
    seconds = wait_seconds(prefer) if service.streams.has_room(caller.key_id) else 0
    wait = Wait(service, seconds)
    with service.streams.one(caller.key_id) if seconds else nullcontext():
        while True:
            job, body, tag = await anyio.to_thread.run_sync(_read_job, service, job_id, caller.tenant_id)
            is_known = conditions.is_known(if_none_match, tag)
            is_news = job.state.is_terminal or (if_none_match is not None and not is_known)
            if is_news or not await wait.pause():
                break
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if not job.state.is_terminal:
        headers["Retry-After"] = "2"
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    if is_known:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def _read_job(service: Context, job_id: str, tenant_id: str) -> tuple[Job, str, str]:
    """Return a job, as it is shown, and its ETag."""
    job = service.jobs.get(job_id, tenant_id)
    detail = job_detail(service, job)
    # Everything shown but the estimate, which changes with the clock alone.
    tag = conditions.etag(job.version, detail.model_dump_json(exclude={"eta_seconds"}))
    return job, detail.model_dump_json(), tag


@router.patch(
    "/jobs/{job_id}",
    operation_id="changeJob",
    summary="Change when and in which queue a job runs, or its labels",
    response_model=JobDetail,
    dependencies=[JSON_BODY],
    responses={
        200: shows(JOB, "The job as it is now", headers=conditions.HEADER),
        **responses(*_ONE_JOB, *BODY_PROBLEMS, "job-conflict", "precondition-failed"),
    },
    openapi_extra={"requestBody": {"content": {"application/json": {"examples": JOB_CHANGES}}}},
)
def change_job(service: Service, caller: Writer, job_id: JobId, body: JobChange, if_match: IfMatch = None) -> Response:
    """Change a waiting job's priority, start or queue, any unfinished job's deadline, or any job's labels.

    `labels` are the whole set: what they leave out is gone.
    With `If-Match` only if the job is still as it was read; somebody else's change is then a 412 and not overwritten.
    """
    expected = conditions.versions(if_match)
    version = None
    if expected is not None:
        # The store compares once more, under its lock.
        version = service.jobs.get(job_id, caller.tenant_id).version
        if version not in expected:
            raise JobChanged(f"Job {job_id} has changed since it was read.")
    changes = changes_of(body)
    with _queue_of_the_body():
        service.jobs.change(job_id, changes, tenant_id=caller.tenant_id, actor=caller.actor, version=version)
    _, shown, tag = _read_job(service, job_id, caller.tenant_id)
    return Response(shown, headers={"ETag": tag}, media_type="application/json")


@router.post(
    "/jobs/{job_id}:retry",
    operation_id="retryJob",
    summary="Run a failed or cancelled job again",
    response_model=JobDetail,
    responses={
        200: shows(JOB, "The job is waiting again", headers=idempotency.HEADERS),
        **responses(
            *_ONE_JOB,
            *idempotency.PROBLEMS,
            "queue-not-found",
            "job-conflict",
            "dependency-failed",
            "quota-exceeded",
        ),
    },
)
def retry_job(service: Service, caller: Writer, job_id: JobId, once: Once) -> Response:
    """Put a failed or cancelled job back in its queue. It goes on from the layers that it has finished."""

    def make(_: None) -> Made:
        job = service.jobs.retry(job_id, tenant_id=caller.tenant_id, actor=caller.actor)
        return Made(job_detail(service, job), status=200, location=f"/v1/jobs/{job.id}")

    return once.answer(caller, lambda: None, make)


@router.post(
    "/jobs/{job_id}:cancel",
    operation_id="cancelJob",
    summary="Cancel a job",
    response_model=JobDetail,
    responses={
        200: {"description": "The job is cancelled", "content": {"application/json": {"example": JOB}}},
        202: shows({**JOB, "state": "cancelling"}, "The job is running; it stops at the next beat", model=JobDetail),
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
    responses={200: shows(LAYERS), **responses(*_ONE_JOB)},
)
def list_job_layers(service: Service, caller: Reader, job_id: JobId) -> LayerList:
    """List the layers in order, with state, error and time. Empty until the job has been planned."""
    job = service.jobs.get(job_id, caller.tenant_id)
    return LayerList(items=[layer_view(row) for row in service.jobs.layers(job.id)])


async def _one_stream(service: Service, caller: Reader) -> AsyncIterator[None]:
    with stream.counted(service, caller.key_id):
        yield


@router.get(
    "/jobs/{job_id}/events",
    operation_id="followJob",
    summary="Follow a job (server-sent events)",
    response_class=StreamingResponse,
    dependencies=[Depends(_one_stream)],
    responses={
        200: {
            "description": "Events as they happen; an `end` event after the last",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENT_STREAM}},
        },
        **responses(*_ONE_JOB, "too-many-streams"),
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
