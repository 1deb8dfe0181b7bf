"""What a job leaves behind: its artifact or its evaluation, and the bill. Written with the transition that says so."""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, Connection, insert, select, update

from infra.database import insert_if_new
from infra.ids import new_id
from infra.job_model import Job
from infra.prepared import Prepared
from infra.schema import artifacts, evaluations, jobs, tenants, usage_ledger

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


def record_evaluation(connection: Connection, job: Job, now: ColumnElement[int]) -> None:
    """Write the row of what a job that has just succeeded measured, if it measured, and the bill for it."""
    result = job.result or {}
    if job.kind == "evaluate" and "metrics" in result:
        values = {
            "id": new_id("eval"),
            "tenant_id": job.tenant_id,
            "job_id": job.id,
            "model_name": job.model_name,
            "metrics": result["metrics"],
        }
        artifact_id = select(artifacts.c.id).where(artifacts.c.job_id == result.get("artifact_job_id"))
        connection.execute(
            insert(evaluations).values(created_at=now, artifact_id=artifact_id.scalar_subquery(), **values)
        )
        seconds, device = result.get("seconds", 0.0), result["metrics"].get("device", UNKNOWN_DEVICE)
        charge_usage(connection, job, layer=0, fence=job.fence, seconds=seconds, device=device, now=now)


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
