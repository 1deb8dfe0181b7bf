"""What a job leaves behind: its artifact or what it has measured, and the bill."""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, Connection, insert, update

from infra.database import insert_if_new
from infra.ids import new_id
from infra.job_model import Job, Measured
from infra.prepared import Prepared
from infra.schema import artifacts, jobs, tenants, usage_ledger

UNKNOWN_DEVICE = "unknown"
_NEW_ARTIFACT = Prepared(
    insert(artifacts),
    columns=(
        *("id", "tenant_id", "job_id", "fingerprint", "model_name", "recipe_name"),
        *("manifest_key", "size_bytes", "summary", "created_at"),
    ),
)


def record_artifact(connection: Connection, job: Job) -> None:
    """Write the row of the artifact that a job that has just succeeded made, if it made one."""
    artifact = (job.result or {}).get("artifact")
    if job.kind == "quantize" and isinstance(artifact, Mapping):
        values = {
            "id": new_id("art"),
            "tenant_id": job.tenant_id,
            "job_id": job.id,
            "fingerprint": job.fingerprint,
            "model_name": job.model_name,
            "recipe_name": job.recipe_name,
            "manifest_key": artifact["manifest_key"],
            "size_bytes": artifact["size_bytes"],
            "summary": artifact["summary"],
            "created_at": job.finished_at,
        }
        _NEW_ARTIFACT.run(connection, values)


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
