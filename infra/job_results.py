"""What a job leaves behind: its artifact or what it has measured, and the bill."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import CTE, ColumnElement, Connection, Insert, bindparam, insert, select, update

from infra.database import insert_if_new
from infra.ids import new_id
from infra.job_model import Job, Measured
from infra.prepared import Prepared
from infra.schema import artifacts, jobs, tenants, usage_ledger

UNKNOWN_DEVICE = "unknown"
_OF_RESULT = ("manifest_key", "size_bytes", "summary")
_OF_JOB = {
    **{name: name for name in ("tenant_id", "fingerprint", "model_name", "recipe_name")},
    "job_id": "id",
    "created_at": "finished_at",
}
_NEW_ARTIFACT = Prepared(insert(artifacts), columns=("id", *_OF_RESULT, *_OF_JOB))


def record_artifact(connection: Connection, job: Job) -> None:
    """Write the row of the artifact that a job that has just succeeded made, if it made one."""
    values = artifact_of(job.kind, job.result or {})
    if values is not None:
        copied = {column: getattr(job, name) for column, name in _OF_JOB.items()}
        _NEW_ARTIFACT.run(connection, {**values, **copied})


def artifact_of(kind: str, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what an artifact's row says beside its job's own facts, if such a job's result has one."""
    artifact = result.get("artifact")
    if kind != "quantize" or not isinstance(artifact, Mapping):
        return None
    return {"id": new_id("art"), **{name: artifact[name] for name in _OF_RESULT}}


def new_artifact_of(moved: CTE) -> Insert:
    """Return the statement that writes the row of an artifact of a job that another part of it has just moved."""
    made = [bindparam(f"artifact_{name}", type_=artifacts.c[name].type).label(name) for name in ("id", *_OF_RESULT)]
    copied = [moved.c[name].label(column) for column, name in _OF_JOB.items()]
    return insert(artifacts).from_select(("id", *_OF_RESULT, *_OF_JOB), select(*made, *copied))


def measured_of(job: Job) -> Measured | None:
    """Return what an evaluate job that has just succeeded has measured; none for other jobs."""
    result = job.result or {}
    if job.kind != "evaluate" or "metrics" not in result:
        return None
    return Measured(
        fingerprint=job.fingerprint,
        artifact_job_id=result.get("artifact_job_id"),
        settings=job.spec.get("evaluation", {}),
        metrics=result["metrics"],
        parts=result.get("parts", {}),
        is_complete=True,
        report_key=result.get("report_key"),
    )


def charge_usage(
    connection: Connection, job: Job, *, layer: int, fence: int, seconds: float, device: str, now: ColumnElement[int]
) -> None:
    """Put slot time on the tenant's bill and its fair share, once for each layer and claim."""
    gpu_ms = round(seconds * 1000)
    values = {"tenant_id": job.tenant_id, "job_id": job.id, "layer": layer, "fence": fence, "device": device}
    if not insert_if_new(connection, usage_ledger, at=now, gpu_ms=gpu_ms, **values):
        return
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(gpu_ms=jobs.c.gpu_ms + gpu_ms))
    share = seconds / tenants.c.weight
    connection.execute(update(tenants).where(tenants.c.id == job.tenant_id).values(vtime=tenants.c.vtime + share))
