"""The dashboard: pages for people, with a session cookie in place of the key. They read without JavaScript too."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from infra.artifacts import Evaluation
from infra.errors import InfraError, JobConflict, JobNotFound
from infra.jobs import Job, JobState
from service import stream
from service.artifact_views import artifact_view
from service.auth import Caller, check_same_site, end_session, session_caller, start_session
from service.context import Context, Service
from service.errors import ProblemError
from service.pages import STATE_ICONS, layer_cells, recipe_parts
from service.schemas.artifacts import ArtifactView
from service.schemas.common import moment
from service.views import job_detail, job_summary

router = APIRouter(include_in_schema=False)

_EVENTS_SHOWN = 60
_PAGE = 50


def _visitor(request: Request, service: Service) -> Caller:
    caller = session_caller(request, service)
    if caller is None or "jobs:read" not in caller.scopes:
        raise ProblemError("unauthorized", "Log in at /login.", headers={"Location": "/login"})
    return caller


Visitor = Annotated[Caller, Depends(_visitor)]


async def _one_stream(service: Service, visitor: Visitor) -> AsyncIterator[None]:
    with stream.counted(service, visitor.key_id):
        yield


ONE_STREAM = Depends(_one_stream)


async def _form(request: Request) -> Mapping[str, str]:
    """Read a posted form, from our own pages only."""
    check_same_site(request)
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=20)
    return {name: values[-1].strip() for name, values in fields.items()}


Form = Annotated[Mapping[str, str], Depends(_form)]


def _page(request: Request, service: Context, name: str, status: int = 200, **values: Any) -> Response:
    return service.pages.TemplateResponse(
        request, name, {"icons": STATE_ICONS, "states": list(JobState), **values}, status_code=status
    )


@router.get("/login")
def login_page(request: Request, service: Service) -> Response:
    """Ask for a key."""
    if session_caller(request, service) is not None:
        return RedirectResponse("/", 303)
    return _page(request, service, "login.html")


@router.post("/login")
def login(request: Request, service: Service, form: Form) -> Response:
    """Turn a key into a session."""
    key = service.keys.authenticate(form.get("key", ""))
    if key is None:
        return _page(request, service, "login.html", 401, error="This API key is not valid.")
    if "jobs:read" not in key.scopes:
        return _page(request, service, "login.html", 403, error="This API key may not read jobs.")
    response = RedirectResponse("/", 303)
    start_session(request, response, service, key)
    return response


@router.post("/logout")
def logout(_form: Form) -> Response:
    """End the session."""
    response = RedirectResponse("/login", 303)
    end_session(response)
    return response


@router.get("/")
def queue_page(
    request: Request, service: Service, state: Annotated[str | None, Query(max_length=20)] = None
) -> Response:
    """Show the jobs, newest first."""
    caller = session_caller(request, service)
    if caller is None:
        return RedirectResponse("/login", 303)
    chosen = JobState(state) if state in set(JobState) else None
    jobs = service.jobs.list(caller.tenant_id, state=chosen, limit=_PAGE)
    counts = service.jobs.counts(caller.tenant_id)
    return _page(
        request,
        service,
        "queue.html",
        jobs=[job_summary(job) for job in jobs],
        counts={each.value: count for each, count in counts.items()},
        total=sum(counts.values()),
        chosen=chosen,
        workers=len(service.jobs.live_workers(60)),
        is_cut=len(jobs) == _PAGE,
    )


@router.get("/live", dependencies=[ONE_STREAM])
def follow_queue(service: Service, visitor: Visitor) -> StreamingResponse:
    """Say when the queue page should be read again."""

    def read() -> str:
        jobs = service.jobs.list(visitor.tenant_id, limit=_PAGE)
        return json.dumps([service.jobs.counts(visitor.tenant_id), [(job.id, job.version) for job in jobs]])

    return stream.respond(stream.changes(service, read))


@router.get("/jobs/{job_id}")
def job_page(request: Request, service: Service, job_id: str) -> Response:
    """Show one job."""
    caller = session_caller(request, service)
    if caller is None:
        return RedirectResponse("/login", 303)
    try:
        job = service.jobs.get(job_id, caller.tenant_id)
    except JobNotFound:
        return _page(request, service, "missing.html", 404, job_id=job_id)
    layers = service.jobs.layers(job.id)
    cells = layer_cells(layers)
    events = _last_events(service, job)
    artifact, artifact_problem = _artifact(service, job, caller)
    return _page(
        request,
        service,
        "job.html",
        job=job_detail(service, job),
        cells=cells,
        sites=list(dict.fromkeys(site for cell in cells for site in cell.sites)),
        events=[(moment(event.at), event) for event in reversed(events)],
        artifact=artifact,
        artifact_problem=artifact_problem,
        elapsed=_elapsed(job, events),
        is_evaluation=job.kind == "evaluate",
        measured=_measured(service, job),
        # What an evaluation was asked to do stands where the recipe of a quantization does.
        recipe_parts=recipe_parts(job.spec["evaluation" if job.kind == "evaluate" else "recipe"]),
        may_write="jobs:write" in caller.scopes,
        is_over=job.state.is_terminal,
    )


def _last_events(service: Context, job: Job) -> list[Any]:
    """Return the newest events, by reading on from the start; a job has a few for each layer."""
    events: list[Any] = []
    while page := service.jobs.events(job.id, after=events[-1].id if events else 0):
        events = [*events, *page][-_EVENTS_SHOWN:]
    return events


def _measured(service: Context, job: Job) -> list[Evaluation]:
    """Return what the job has measured, or what was measured on its artifact, newest first."""
    artifact = service.artifacts.of_jobs([job.id]).get(job.id)
    if artifact is not None:
        return list(service.artifacts.evaluations([artifact.id]).get(artifact.id, ()))
    # An evaluation; or a quality gate that was missed, of which only the numbers are left.
    return list(service.evaluations.of_jobs([job.id]).values())


def _elapsed(job: Job, events: list[Any]) -> float | None:
    """Return how long the job has run; one that still runs is measured to its last event, by the same clock."""
    if job.started_at is None:
        return None
    until = job.finished_at or (events[-1].at if events else job.started_at)
    return max(until - job.started_at, 0) / 1000


def _artifact(service: Context, job: Job, caller: Caller) -> tuple[ArtifactView | None, str | None]:
    if job.state is not JobState.SUCCEEDED or job.kind == "evaluate":
        return None, None
    if "artifacts:read" not in caller.scopes:
        return None, "This API key may not read artifacts."
    try:
        return artifact_view(service, job), None
    except ProblemError as error:
        return None, error.detail
    except InfraError:
        return None, "The object store does not answer; the rest of this page is current."


@router.get("/jobs/{job_id}/live", dependencies=[ONE_STREAM])
def follow_job_page(service: Service, visitor: Visitor, job_id: str) -> StreamingResponse:
    """Say when the job's page should be read again."""
    job = service.jobs.get(job_id, visitor.tenant_id)

    def read() -> str:
        now = service.jobs.get(job.id)
        return f"{now.version} {service.jobs.queue_position(now)}"

    return stream.respond(stream.changes(service, read))


@router.get("/jobs/{job_id}/files/{name:path}")
def download(service: Service, visitor: Visitor, job_id: str, name: str) -> Response:
    """Send the browser to a fresh download link."""
    job = service.jobs.get(job_id, visitor.tenant_id)
    if "artifacts:read" not in visitor.scopes:
        raise ProblemError("missing-scope", "This API key lacks the scope artifacts:read.")
    for file in artifact_view(service, job).files:
        if file.name == name:
            return RedirectResponse(file.url, 303)
    raise ProblemError("not-found", f"The artifact of {job_id} has no file {name!r}.")


@router.post("/jobs/{job_id}/cancel")
def cancel(service: Service, visitor: Visitor, job_id: str, _form: Form) -> Response:
    """Cancel a job and go back to its page; one that has ended meanwhile just shows so."""
    if "jobs:write" not in visitor.scopes:
        raise ProblemError("missing-scope", "This API key lacks the scope jobs:write.")
    with contextlib.suppress(JobConflict):
        service.jobs.cancel(job_id, tenant_id=visitor.tenant_id, actor=visitor.actor)
    return RedirectResponse(f"/jobs/{job_id}", 303)
