"""Turns the job store's rows into what the API and the dashboard show."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from infra.jobs import Job, JobState, LayerRow
from service.context import Context
from service.schemas.common import moment
from service.schemas.jobs import JobDetail, JobSubmitted, JobSummary, LayerCounts, LayerView, Progress
from service.schemas.models import ModelRequest


def job_summary(job: Job) -> JobSummary:
    """Show a job in a list."""
    return JobSummary(**_facts(job))


def job_detail(service: Context, job: Job) -> JobDetail:
    """Show a job with its layers, its place in the queue and its time left."""
    return JobDetail(**_all_facts(service, job))


def job_submitted(service: Context, job: Job, *, created: bool, evaluation_job_id: str | None = None) -> JobSubmitted:
    """Show a job to whoever has just asked for it."""
    # A job that is new is measured by nothing but what was asked for with it.
    evaluations = [each for each in (evaluation_job_id,) if each is not None] if created else None
    facts = _all_facts(service, job, evaluations)
    return JobSubmitted(**facts, reused=not created, evaluation_job_id=evaluation_job_id)


def _facts(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state.value,
        "reason": job.reason,
        "detail": job.detail,
        "model": ModelRequest(**job.spec["model"]) if job.spec.get("model") else None,
        "recipe_name": job.recipe_name,
        "queue": job.queue,
        "priority": job.priority,
        "batch_id": job.batch_id,
        "labels": job.labels or {},
        "created_at": moment(job.created_at),
        "run_at": moment(job.run_at),
        "deadline_at": moment(job.deadline_at),
        "started_at": moment(job.started_at),
        "finished_at": moment(job.finished_at),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "lease_losses": job.lease_losses,
        "gpu_seconds": job.gpu_ms / 1000,
        "progress": Progress(phase=job.phase or None, done=job.progress_done, total=job.progress_total),
        "fingerprint": job.fingerprint,
    }


def _all_facts(service: Context, job: Job, evaluations: Sequence[str] | None = None) -> dict[str, Any]:
    """Return all that is shown of a job; `evaluations` are the jobs that measure its artifact, where they are known."""
    if evaluations is None:
        evaluations = [] if job.kind == "evaluate" else service.search.evaluations_of(job.id)
    # A job that nobody has ever claimed has not been planned, so it has no layers to ask for.
    layers = service.jobs.layers(job.id) if job.fence else []
    ahead = service.jobs.queue_position(job)
    return {
        **_facts(job),
        "recipe": job.spec.get("recipe"),
        "depends_on": list(service.search.dependencies(job.id)),
        "artifact_job_id": job.spec.get("artifact_job_id"),
        "evaluation_job_ids": list(evaluations),
        "layers": layer_counts(layers),
        "queue_position": None if ahead is None else ahead + 1,
        "eta_seconds": eta_seconds(job, layers),
        "result": job.result,
        "version": job.version,
    }


def layer_counts(layers: Sequence[LayerRow]) -> LayerCounts:
    """Count layers by state."""
    counts = Counter(str(row.state) for row in layers)
    return LayerCounts(
        total=len(layers),
        pending=counts["pending"],
        running=counts["running"],
        done=counts["done"],
        failed=counts["failed"],
    )


def layer_view(row: LayerRow) -> LayerView:
    """Show a layer. Its object key is left out: links come from the artifact endpoint."""
    return LayerView(
        layer=row.layer,
        state=str(row.state),
        attempt=row.attempt,
        seconds=row.seconds,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        metrics=row.metrics,
        node=row.node,
        detail=row.detail,
        started_at=moment(row.started_at),
        finished_at=moment(row.finished_at),
    )


def eta_seconds(job: Job, layers: Sequence[LayerRow], now_ms: float | None = None) -> float | None:
    """Estimate the time left from the pace of this attempt's finished layers; None without any.

    Clocks of the database and of this process may differ by a little; an estimate can bear that.
    """
    if job.state is not JobState.RUNNING:
        return None
    now_ms = time.time() * 1000 if now_ms is None else now_ms
    finished = [row for row in layers if row.state == "done" and row.fence == job.fence and row.started_at is not None]
    remaining = sum(row.state != "done" for row in layers)
    if not finished or not remaining:
        return None
    began = min(row.started_at for row in finished if row.started_at is not None)
    return round(max(now_ms - began, 0) / 1000 / len(finished) * remaining, 1)
