"""Shows batches: how far they are, and as a table at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from infra.artifacts import Artifact, Evaluation
from infra.batch_progress import REFUSED, Tally, progress_of
from infra.batches import Batch, BatchItem
from infra.jobs import Job
from service.context import Context
from service.schemas.batches import BatchRow, BatchTable, BatchView, WorkCounts
from service.schemas.common import moment


def batch_views(service: Context, batches: Sequence[Batch]) -> list[BatchView]:
    """Show batches with their counts."""
    ids = [batch.id for batch in batches]
    tallies, reused = service.batches.tallies(ids), service.batches.reused(ids)
    return [_view(batch, tallies.get(batch.id, {}), reused.get(batch.id, 0)) for batch in batches]


def batch_view(service: Context, batch: Batch) -> BatchView:
    """Show a batch with its counts."""
    return batch_views(service, [batch])[0]


def _view(batch: Batch, tally: Tally, reused: int) -> BatchView:
    progress = progress_of(tally)
    return BatchView(
        id=batch.id,
        name=batch.name,
        state=progress.state,
        jobs=WorkCounts(**asdict(progress.jobs)),
        reused=reused,
        evaluations=WorkCounts(**asdict(progress.evaluations)),
        created_at=moment(batch.created_at),
        cancelled_at=moment(batch.cancelled_at),
        finished_at=moment(batch.finished_at),
        request=batch.spec,
    )


def batch_table(service: Context, batch: Batch) -> BatchTable:
    """Show what a batch has made, side by side."""
    items = service.batches.items(batch.id)
    made = service.artifacts.of_jobs(job.id for _, job in items if job is not None and job.kind == "quantize")
    measured = service.evaluations.of_jobs(job.id for _, job in items if job is not None and job.kind == "evaluate")
    # By the job whose artifact was measured; by the model's identity for unquantized models.
    tests = {
        job.spec["artifact_job_id"] or job.spec["model_identity"]: (item, job)
        for item, job in items
        if job is not None and job.kind == "evaluate"
    }
    rows = []
    for item, job in items:
        if job is None or job.kind == "quantize":
            rows.append(_made_row(item, job, made, tests, measured))
        elif job.spec["artifact_job_id"] is None:
            rows.append(_model_row(item, job, measured.get(job.id)))
    return BatchTable(rows=rows)


def _made_row(
    item: BatchItem,
    job: Job | None,
    made: Mapping[str, Artifact],
    tests: Mapping[str, tuple[BatchItem, Job]],
    measured: Mapping[str, Evaluation],
) -> BatchRow:
    artifact = made.get(job.id) if job is not None else None
    test = tests[job.id][1] if job is not None and job.id in tests else None
    baseline = tests.get(job.spec["model_identity"]) if job is not None else None
    metrics = measured[test.id].metrics if test is not None and test.id in measured else {}
    before = measured[baseline[1].id].metrics if baseline is not None and baseline[1].id in measured else {}
    perplexity, reference = metrics.get("perplexity"), before.get("perplexity")
    result = job.result if job is not None and job.result else {}
    return BatchRow(
        model_name=item.model_name,
        recipe_name=item.recipe_name,
        state=REFUSED if job is None else job.state.value,
        reason=None if job is None else job.reason,
        detail=item.detail if job is None else job.detail,
        job_id=item.job_id,
        reused=item.reused,
        artifact_id=None if artifact is None else artifact.id,
        size_bytes=None if artifact is None else artifact.size_bytes,
        size_ratio=None if artifact is None else artifact.summary.get("size_ratio"),
        seconds=result.get("seconds"),
        perplexity=perplexity,
        perplexity_ratio=perplexity / reference if perplexity and reference else None,
        tokens_per_second=metrics.get("tokens_per_second"),
        evaluation_state=None if test is None else test.state.value,
        evaluation_job_id=None if test is None else test.id,
        evaluation_reason=None if test is None else test.reason,
        evaluation_detail=None if test is None else test.detail,
    )


def _model_row(item: BatchItem, job: Job, measured: Evaluation | None) -> BatchRow:
    metrics = {} if measured is None else measured.metrics
    return BatchRow(
        model_name=item.model_name,
        recipe_name=item.recipe_name,
        state=job.state.value,
        reason=job.reason,
        detail=job.detail,
        job_id=item.job_id,
        reused=item.reused,
        artifact_id=None,
        size_bytes=metrics.get("model_bytes"),
        size_ratio=None,
        seconds=None,
        perplexity=metrics.get("perplexity"),
        perplexity_ratio=None,
        tokens_per_second=metrics.get("tokens_per_second"),
        evaluation_state=job.state.value,
        evaluation_job_id=job.id,
        evaluation_reason=job.reason,
        evaluation_detail=job.detail,
    )
