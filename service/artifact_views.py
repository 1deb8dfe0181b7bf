"""Shows artifacts: what they are, their files with links, and how two of them differ."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from infra.artifact_keys import ArtifactKeys, require_inside
from infra.artifacts import Artifact, Evaluation
from infra.errors import ObjectNotFound
from infra.jobs import Job, JobState
from service.context import Context
from service.errors import ProblemError
from service.requantize import outdated
from service.schemas.artifacts import (
    ArtifactComparison,
    ArtifactFile,
    ArtifactSummary,
    ArtifactView,
    FieldDifference,
    FileComparison,
)
from service.schemas.common import moment
from service.schemas.evaluations import evaluation_view

MANIFEST = "manifest.json"


def artifact_summaries(service: Context, artifacts: Sequence[Artifact]) -> list[ArtifactSummary]:
    """Show artifacts with their tags and what was measured on them."""
    ids = [artifact.id for artifact in artifacts]
    tags, evaluations = service.artifacts.tags(ids), service.artifacts.evaluations(ids)
    jobs = service.artifacts.makers(artifacts)
    return [
        ArtifactSummary(
            id=artifact.id,
            job_id=artifact.job_id,
            model_name=artifact.model_name,
            recipe_name=artifact.recipe_name,
            fingerprint=artifact.fingerprint,
            size_bytes=artifact.size_bytes,
            summary=artifact.summary,
            tags=list(tags.get(artifact.id, ())),
            evaluations=[evaluation_view(each) for each in evaluations.get(artifact.id, ())],
            outdated=outdated(jobs[artifact.job_id]),
            created_at=moment(artifact.created_at),
            expires_at=moment(artifact.expires_at),
        )
        for artifact in artifacts
    ]


def artifact_summary(service: Context, artifact: Artifact) -> ArtifactSummary:
    """Show an artifact with its tags and what was measured on it."""
    return artifact_summaries(service, [artifact])[0]


def read_manifest(service: Context, manifest_key: str, job_id: str) -> tuple[dict[str, Any], bytes]:
    """Return the manifest of an artifact, and its bytes.

    Raises:
        ProblemError: it is gone.
    """
    try:
        content = service.storage.get_bytes(manifest_key)
    except ObjectNotFound as error:
        detail = f"The artifact of job {job_id} is gone from the object store; submit it again with force."
        raise ProblemError("artifact-not-ready", detail) from error
    manifest: dict[str, Any] = json.loads(content)
    return manifest, content


def artifact_view(service: Context, job: Job) -> ArtifactView:
    """Read the manifest of a job's artifact and sign a link for each file.

    Raises:
        ProblemError: the job has not succeeded, or its artifact was deleted.
    """
    if job.state is not JobState.SUCCEEDED or job.result is None or "artifact" not in job.result:
        detail = f"Job {job.id} is {job.state.value}; only a quantize job that has succeeded has an artifact."
        raise ProblemError("artifact-not-ready", detail)
    artifact = service.artifacts.of_jobs([job.id]).get(job.id)
    if artifact is None:
        raise ProblemError("artifact-not-ready", f"The artifact of job {job.id} was deleted; submit it again.")
    prefix = ArtifactKeys(job.tenant_id, job.id).prefix
    manifest, content = read_manifest(service, artifact.manifest_key, job.id)
    expires_at = datetime.fromtimestamp(time.time() + service.settings.presign_seconds, UTC)

    def link(key: str, name: str) -> str:
        # The manifest is ours, but links are signed with our rights: never for anything outside this job's folder.
        inside = require_inside(key, prefix)
        return service.storage.presign(inside, service.settings.presign_seconds, name.rpartition("/")[2])

    entries = [*manifest["files"], {**_facts(content), "key": artifact.manifest_key}]
    files = [
        ArtifactFile(
            name=entry["name"],
            sha256=entry["sha256"],
            size_bytes=entry["size_bytes"],
            url=link(entry["key"], entry["name"]),
        )
        for entry in entries
    ]
    measured = service.artifacts.evaluations([artifact.id]).get(artifact.id, ())
    return ArtifactView(
        job_id=job.id,
        fingerprint=job.fingerprint,
        size_bytes=sum(file.size_bytes for file in files),
        expires_at=expires_at,
        evaluation=next((dict(each.metrics) for each in measured if each.is_complete), {}),
        files=files,
    )


def _facts(content: bytes) -> dict[str, Any]:
    return {"name": MANIFEST, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def compare(service: Context, a: Artifact, b: Artifact) -> ArtifactComparison:
    """Show how two artifacts differ.

    Raises:
        ProblemError: one of them is gone from the object store.
    """
    summaries = artifact_summaries(service, [a, b])
    jobs = service.artifacts.makers([a, b])
    manifests = [read_manifest(service, each.manifest_key, each.job_id)[0] for each in (a, b)]
    recipes = [dict(_flat(jobs[each.job_id].spec["recipe"])) for each in (a, b)]
    evaluations = service.artifacts.evaluations([a.id, b.id])
    return ArtifactComparison(
        a=summaries[0],
        b=summaries[1],
        recipe=_differences(*recipes),
        measures=_differences(
            *(_measures(each, jobs[each.job_id], evaluations.get(each.id, ())) for each in (a, b)), only_shared=True
        ),
        files=_compare_files(*({file["name"]: file["sha256"] for file in each["files"]} for each in manifests)),
    )


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _measures(artifact: Artifact, job: Job, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return what can be measured of an artifact, by name. The newest evaluation with the same settings counts."""
    found = {"size_bytes": artifact.size_bytes, "seconds": (job.result or {}).get("seconds")}
    found |= {f"summary.{name}": value for name, value in artifact.summary.items()}
    for each in reversed(evaluations):
        settings = f"{each.metrics.get('windows')} windows of {each.metrics.get('seq_len')}"
        for name in ("perplexity", "tokens_per_second"):
            found[f"{name} ({settings})"] = each.metrics.get(name)
        for task, scores in each.metrics.get("tasks", {}).items():
            found[f"accuracy of {task}"] = scores.get("acc")
    return found


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], *, only_shared: bool = False) -> list[FieldDifference]:
    names = [name for name in dict.fromkeys([*a, *b]) if not only_shared or (name in a and name in b)]
    return [FieldDifference(field=name, a=a.get(name), b=b.get(name)) for name in names if a.get(name) != b.get(name)]


def _compare_files(a: Mapping[str, str], b: Mapping[str, str]) -> FileComparison:
    shared = [name for name in a if name in b]
    return FileComparison(
        same=sum(a[name] == b[name] for name in shared),
        changed=[name for name in shared if a[name] != b[name]],
        only_a=[name for name in a if name not in b],
        only_b=[name for name in b if name not in a],
    )
