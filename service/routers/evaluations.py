"""/v1/evaluations: measure artifacts and models, and read what was measured."""

import re
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from infra.artifact_keys import REPORTS, require_inside
from infra.artifacts import Evaluation
from infra.errors import EvaluationNotFound
from infra.jobs import NewJob
from service import idempotency
from service.api_route import ApiRoute
from service.auth import Caller, Reader, Writer
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import COMMON, ProblemError, responses
from service.evaluate import requested_evaluation
from service.filters import Name, require_text
from service.idempotency import Made, Once
from service.openapi import header, shows
from service.paging import Cursor, Limit, cut, read_cursor
from service.routers.artifacts import ID_PATTERN
from service.schemas.evaluations import EvaluationPage, EvaluationRequest, EvaluationView, evaluation_view
from service.schemas.jobs import JobSubmitted
from service.views import job_submitted
from service.zoo_examples import EVALUATION, EVALUATION_JOB, EVALUATION_REQUESTS

router = APIRouter(prefix="/v1", tags=["evaluations"], route_class=ApiRoute)

EvaluationId = Annotated[
    str,
    Path(
        description="The id of the evaluation, or of the job that measured",
        examples=["eval_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"],
    ),
]


_ID = re.compile(r"(eval|job)_[0-9a-z]{1,60}", re.ASCII)


def _named(service: Service, caller: Caller, name: str) -> Evaluation:
    """Return the evaluation with an id, or of a job.

    Raises:
        EvaluationNotFound: there is none, or nothing could have this id.
    """
    if not _ID.fullmatch(name):
        detail = f"There is no evaluation {name!r}; an id begins with eval_, or with job_ for that of a job."
        raise EvaluationNotFound(detail)
    return service.evaluations.get(name, caller.tenant_id)


@router.post(
    "/evaluations",
    operation_id="submitEvaluation",
    summary="Submit an evaluation",
    status_code=201,
    response_model=JobSubmitted,
    dependencies=[JSON_BODY],
    responses={
        200: shows(
            {**EVALUATION_JOB, "reused": True},
            "A job that measures or measured the same was there; it is returned",
            model=JobSubmitted,
            headers=idempotency.HEADERS,
        ),
        201: shows(
            {**EVALUATION_JOB, "reused": False}, "The job was made; Location names it", headers=idempotency.HEADERS
        ),
        **responses(
            *COMMON,
            *BODY_PROBLEMS,
            "artifact-not-found",
            "job-conflict",
            "quota-exceeded",
            "model-forbidden",
            "model-not-found",
            "text-forbidden",
            "text-not-found",
            *idempotency.PROBLEMS,
        ),
    },
    openapi_extra={"requestBody": {"content": {"application/json": {"examples": EVALUATION_REQUESTS}}}},
)
def submit_evaluation(service: Service, caller: Writer, body: EvaluationRequest, once: Once) -> Response:
    """Queue a job that measures an artifact or an unquantized model: perplexity, accuracy on tasks, speed.

    Measuring the same again gives back the job that is active or finished, with `reused: true` and status 200, unless
    `force` is set.
    """

    def make(new: NewJob) -> Made:
        job, created = service.jobs.enqueue(new, force=body.force, actor=caller.actor)
        view = job_submitted(service, job, created=created)
        return Made(view, status=201 if created else 200, location=f"/v1/jobs/{job.id}")

    return once.answer(caller, lambda: requested_evaluation(service, caller, body), make)


@router.get(
    "/evaluations",
    operation_id="listEvaluations",
    summary="List evaluations, newest first",
    responses={
        200: shows({"items": [EVALUATION], "next_cursor": None}),
        **responses(*COMMON, "artifact-not-found"),
    },
)
def list_evaluations(
    service: Service,
    caller: Reader,
    artifact: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="Only what was measured on this artifact")
    ] = None,
    model: Annotated[Name, Query(description="Only what was measured on the model with this name")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> EvaluationPage:
    """List by pages what was measured."""
    require_text("model", model)
    artifact_id = None if artifact is None else service.artifacts.get(artifact, caller.tenant_id).id
    found = service.evaluations.page(
        caller.tenant_id,
        artifact_id=artifact_id,
        model_name=model,
        limit=limit + 1,
        before=read_cursor(cursor, "eval_"),
    )
    page, next_cursor = cut(found, limit)
    return EvaluationPage(items=[evaluation_view(each) for each in page], next_cursor=next_cursor)


@router.get(
    "/evaluations/{evaluation_id}",
    operation_id="getEvaluation",
    summary="Read an evaluation",
    responses={200: shows(EVALUATION), **responses(*COMMON, "evaluation-not-found")},
)
def get_evaluation(service: Service, caller: Reader, evaluation_id: EvaluationId) -> EvaluationView:
    """Read what was measured.

    A job that measures has an evaluation from its first finished part on, and keeps it if a later part fails.
    """
    return evaluation_view(_named(service, caller, evaluation_id))


@router.get(
    "/evaluations/{evaluation_id}/report",
    operation_id="getEvaluationReport",
    summary="Read an evaluation's report",
    status_code=307,
    response_class=Response,
    responses={
        307: {
            "description": "The report, as HTML with tables and plots, is at Location for a few minutes",
            "headers": {"Location": header("A link that works without the API key")},
        },
        **responses(*COMMON, "evaluation-not-found", "report-not-ready"),
    },
)
def get_evaluation_report(service: Service, caller: Reader, evaluation_id: EvaluationId) -> Response:
    """Lead to the report on an evaluation, a page of HTML that needs no other files."""
    evaluation = _named(service, caller, evaluation_id)
    key = evaluation.report_key
    if key is None:
        detail = f"{evaluation.id} has no report: not all of its parts have been measured."
        raise ProblemError("report-not-ready", detail)
    # Links are signed with our rights: never for anything but a report of this project.
    inside = require_inside(key, f"{REPORTS}{evaluation.tenant_id}/")
    link = service.storage.presign(inside, service.settings.presign_seconds, f"{evaluation.id}.html")
    return Response(status_code=307, headers={"Location": link, "Cache-Control": "no-store"})
