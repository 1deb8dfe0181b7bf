"""/v1/artifacts and /v1/jobs/{id}/artifact: what jobs made, with download links."""

import time
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from infra.artifacts import ArtifactFilter
from service.api_route import ApiRoute
from service.artifact_views import artifact_summaries, artifact_summary, artifact_view, compare
from service.auth import ArtifactReader, ArtifactWriter
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import COMMON, FieldProblem, ProblemError, responses
from service.examples import ARTIFACT
from service.filters import CreatedFrom, CreatedUntil, Name, require_text
from service.openapi import shows, takes
from service.paging import Cursor, Limit, cut, read_cursor
from service.routers.jobs import JobId
from service.schemas.artifacts import (
    ArtifactChange,
    ArtifactComparison,
    ArtifactPage,
    ArtifactSummary,
    ArtifactView,
)
from service.schemas.batches import TAG, TAG_PATTERN
from service.schemas.common import milliseconds
from service.zoo_examples import ARTIFACT_COMPARISON, ARTIFACT_SUMMARY

router = APIRouter(prefix="/v1", tags=["artifacts"], route_class=ApiRoute)

ID_PATTERN = r"^(art|job)_[0-9a-z]{1,60}$"
ArtifactId = Annotated[
    str,
    Path(
        description="The id of the artifact, or of the job that made it",
        examples=["art_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"],
    ),
]
TagName = Annotated[str, Path(pattern=TAG, description="A name of your own", examples=["prod"])]

_NOW_SECONDS = 60
"""A time that is past for no longer is taken for now: clocks differ, and requests take their time."""
_ONE = (*COMMON, "artifact-not-found")


@router.get(
    "/artifacts",
    operation_id="listArtifacts",
    summary="List artifacts, newest first",
    responses={200: shows({"items": [ARTIFACT_SUMMARY], "next_cursor": None}), **responses(*COMMON)},
)
def list_artifacts(
    service: Service,
    caller: ArtifactReader,
    model: Annotated[Name, Query(description="Only artifacts of the model with this name")] = None,
    recipe: Annotated[Name, Query(description="Only artifacts made with the recipe of this name")] = None,
    tag: Annotated[
        str | None,
        Query(pattern=TAG_PATTERN, description="Only artifacts with this tag; with * at its end, the beginning of one"),
    ] = None,
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> ArtifactPage:
    """List this project's artifacts by pages, each with its tags and what was measured on it."""
    require_text("model", model)
    require_text("recipe", recipe)
    wanted = ArtifactFilter(
        model_name=model,
        recipe_name=recipe,
        tag=tag,
        created_from=milliseconds(created_from),
        created_until=milliseconds(created_until),
    )
    found = service.artifacts.page(caller.tenant_id, wanted, limit=limit + 1, before=read_cursor(cursor, "art_"))
    page, next_cursor = cut(found, limit)
    return ArtifactPage(items=artifact_summaries(service, page), next_cursor=next_cursor)


@router.get(
    "/artifacts/{artifact_id}",
    operation_id="getArtifact",
    summary="Read an artifact",
    responses={200: shows(ARTIFACT_SUMMARY), **responses(*_ONE)},
)
def get_artifact(service: Service, caller: ArtifactReader, artifact_id: ArtifactId) -> ArtifactSummary:
    """Read what an artifact is, its tags, and what was measured on it."""
    return artifact_summary(service, service.artifacts.get(artifact_id, caller.tenant_id))


@router.get(
    "/artifacts/{artifact_id}/files",
    operation_id="listArtifactFiles",
    summary="Get an artifact's files",
    responses={200: shows(ARTIFACT), **responses(*_ONE, "artifact-not-ready")},
)
def list_artifact_files(service: Service, caller: ArtifactReader, artifact_id: ArtifactId) -> ArtifactView:
    """List the files, each with its sha256, its size and a download link."""
    artifact = service.artifacts.get(artifact_id, caller.tenant_id)
    return artifact_view(service, service.jobs.get(artifact.job_id, caller.tenant_id))


@router.get(
    "/artifacts/{artifact_id}/comparison",
    operation_id="compareArtifacts",
    summary="Compare two artifacts",
    responses={200: shows(ARTIFACT_COMPARISON), **responses(*_ONE, "artifact-not-ready")},
)
def compare_artifacts(
    service: Service,
    caller: ArtifactReader,
    artifact_id: ArtifactId,
    other: Annotated[str, Query(alias="with", pattern=ID_PATTERN, description="The other artifact")],
) -> ArtifactComparison:
    """Show how two artifacts differ: their recipes, their measures and their files."""
    a = service.artifacts.get(artifact_id, caller.tenant_id)
    return compare(service, a, service.artifacts.get(other, caller.tenant_id))


@router.patch(
    "/artifacts/{artifact_id}",
    operation_id="changeArtifact",
    summary="Change how long an artifact is kept",
    dependencies=[JSON_BODY],
    responses={200: shows(ARTIFACT_SUMMARY), **responses(*_ONE, *BODY_PROBLEMS)},
    openapi_extra=takes(for_ever={"expires_at": None}, a_year={"expires_at": "2036-01-05T09:30:00Z"}),
)
def change_artifact(
    service: Service, caller: ArtifactWriter, artifact_id: ArtifactId, body: ArtifactChange
) -> ArtifactSummary:
    """Say when an artifact may be deleted: now or later, or, with null, never."""
    if body.expires_at is not None and body.expires_at.timestamp() < time.time() - _NOW_SECONDS:
        # The collector would delete it at once, and whoever wants that has DELETE.
        detail = "expires_at must not lie in the past"
        raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/expires_at", detail=detail)])
    artifact = service.artifacts.keep_until(
        artifact_id, milliseconds(body.expires_at), tenant_id=caller.tenant_id, actor=caller.actor
    )
    return artifact_summary(service, artifact)


@router.delete(
    "/artifacts/{artifact_id}",
    operation_id="deleteArtifact",
    summary="Delete an artifact",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is deleted"}, **responses(*_ONE, "artifact-conflict")},
)
def delete_artifact(
    service: Service,
    caller: ArtifactWriter,
    artifact_id: ArtifactId,
    force: Annotated[bool, Query(description="Delete it also when it has tags")] = False,
) -> Response:
    """Delete an artifact. Its files follow when the collector runs; links that were given out work until then."""
    service.artifacts.delete(artifact_id, tenant_id=caller.tenant_id, actor=caller.actor, force=force)
    return Response(status_code=204)


@router.put(
    "/artifacts/{artifact_id}/tags/{tag}",
    operation_id="tagArtifact",
    summary="Tag an artifact",
    responses={200: shows(ARTIFACT_SUMMARY), **responses(*_ONE)},
)
def tag_artifact(service: Service, caller: ArtifactWriter, artifact_id: ArtifactId, tag: TagName) -> ArtifactSummary:
    """Give an artifact a tag. The artifact that had it loses it."""
    artifact = service.artifacts.tag(artifact_id, tag, tenant_id=caller.tenant_id, actor=caller.actor)
    return artifact_summary(service, artifact)


@router.delete(
    "/artifacts/{artifact_id}/tags/{tag}",
    operation_id="untagArtifact",
    summary="Take a tag away",
    responses={200: shows(ARTIFACT_SUMMARY), **responses(*_ONE)},
)
def untag_artifact(service: Service, caller: ArtifactWriter, artifact_id: ArtifactId, tag: TagName) -> ArtifactSummary:
    """Take a tag away from an artifact; one that is not there is no error."""
    artifact = service.artifacts.untag(artifact_id, tag, tenant_id=caller.tenant_id, actor=caller.actor)
    return artifact_summary(service, artifact)


@router.get(
    "/jobs/{job_id}/artifact",
    operation_id="getJobArtifact",
    summary="Get the files of a job's artifact",
    responses={
        200: shows(ARTIFACT),
        **responses(*COMMON, "job-not-found", "artifact-not-ready"),
    },
)
def get_job_artifact(service: Service, caller: ArtifactReader, job_id: JobId) -> ArtifactView:
    """List the files of a finished artifact, each with its sha256, its size and a download link."""
    return artifact_view(service, service.jobs.get(job_id, caller.tenant_id))
