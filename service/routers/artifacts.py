"""/v1/jobs/{id}/artifact: what a job made, with download links."""

import hashlib
import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from infra.artifact_keys import ArtifactKeys
from infra.errors import ObjectNotFound
from infra.jobs import Job, JobState
from service.auth import ArtifactReader
from service.context import Context, context
from service.errors import ProblemError, responses
from service.examples import ARTIFACT
from service.routers.jobs import JobId
from service.schemas.artifacts import ArtifactFile, ArtifactView

router = APIRouter(prefix="/v1", tags=["artifacts"])


@router.get(
    "/jobs/{job_id}/artifact",
    operation_id="getArtifact",
    summary="Get a job's artifact",
    responses={
        200: {"content": {"application/json": {"example": ARTIFACT}}},
        **responses(
            "unauthorized",
            "missing-scope",
            "job-not-found",
            "artifact-not-ready",
            "validation-failed",
            "internal-error",
            "service-unavailable",
        ),
    },
)
def get_artifact(service: Annotated[Context, Depends(context)], caller: ArtifactReader, job_id: JobId) -> ArtifactView:
    """List the files of a finished artifact, each with its sha256, its size and a download link."""
    return artifact_view(service, service.jobs.get(job_id, caller.tenant_id))


def artifact_view(service: Context, job: Job) -> ArtifactView:
    """Read the manifest of a job's artifact and sign a link for each file.

    Raises:
        ProblemError: the job has not succeeded.
    """
    if job.state is not JobState.SUCCEEDED or job.result is None:
        detail = f"Job {job.id} is {job.state.value}; only a succeeded job has an artifact."
        raise ProblemError("artifact-not-ready", detail)
    prefix = ArtifactKeys(job.tenant_id, job.id).prefix
    manifest_key = job.result["artifact"]["manifest_key"]
    try:
        content = service.storage.get_bytes(manifest_key)
    except ObjectNotFound as error:
        detail = f"The artifact of job {job.id} is gone from the object store; submit it again with force."
        raise ProblemError("artifact-not-ready", detail) from error
    manifest: dict[str, Any] = json.loads(content)
    expires_at = datetime.fromtimestamp(time.time() + service.settings.presign_seconds, UTC)

    def link(key: str, name: str) -> str:
        # The manifest is ours, but links are signed with our rights: never for anything outside this job's folder.
        assert key.startswith(prefix), key
        filename = name.rpartition("/")[2]
        return service.storage.presign(key, service.settings.presign_seconds, filename)

    files = [
        ArtifactFile(
            name=entry["name"],
            sha256=entry["sha256"],
            size_bytes=entry["size_bytes"],
            url=link(entry["key"], entry["name"]),
        )
        for entry in manifest["files"]
    ]
    files.append(
        ArtifactFile(
            name="manifest.json",
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            url=link(manifest_key, "manifest.json"),
        )
    )
    return ArtifactView(
        job_id=job.id,
        fingerprint=job.fingerprint,
        size_bytes=sum(file.size_bytes for file in files),
        expires_at=expires_at,
        evaluation=manifest.get("evaluation", {}),
        files=files,
    )
