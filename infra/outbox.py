"""The outbox of webhooks: what is to be told is written in the transaction in which it happens, and sent later."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select

from infra.ids import new_id
from infra.job_model import Job, JobState
from infra.schema import webhook_deliveries, webhooks

JOB_EVENTS = {
    JobState.RUNNING: "job.started",
    JobState.SUCCEEDED: "job.succeeded",
    JobState.FAILED: "job.failed",
    JobState.CANCELLED: "job.cancelled",
}
"""The event that entering a state is; other transitions are told to nobody."""
BATCH_FINISHED = "batch.finished"
EVENTS = (*JOB_EVENTS.values(), BATCH_FINISHED)
"""What a webhook can ask to hear of."""


def post_job_event(connection: Connection, job: Job, now: ColumnElement[int]) -> None:
    """Put a delivery for each webhook of the job's tenant that wants to hear of the state the job is in now."""
    event = JOB_EVENTS.get(job.state)
    if event is not None:
        post(connection, job.tenant_id, event, _job_facts(job), now, job_id=job.id)


def post(
    connection: Connection,
    tenant_id: str,
    event: str,
    facts: Mapping[str, Any],
    now: ColumnElement[int],
    *,
    job_id: str | None = None,
) -> None:
    """Put a delivery for each webhook of a tenant that wants to hear of an event.

    `facts` are what it says: enough to act on without asking back, and no secrets.
    """
    query = select(webhooks.c.id, webhooks.c.events).where(webhooks.c.tenant_id == tenant_id, webhooks.c.enabled == 1)
    wanted = [row.id for row in connection.execute(query) if not row.events or event in row.events]
    if not wanted:
        return
    payload = {"type": event, "data": dict(facts)}
    statement = insert(webhook_deliveries).values(
        event=event, job_id=job_id, payload=payload, state="pending", attempt=0, next_at=now, created_at=now
    )
    for webhook_id in wanted:
        connection.execute(statement.values(id=new_id("msg"), webhook_id=webhook_id))


def _job_facts(job: Job) -> dict[str, object]:
    return {
        "job_id": job.id,
        "kind": job.kind,
        "state": job.state.value,
        "reason": job.reason,
        "detail": job.detail,
        "model_name": job.model_name,
        "recipe_name": job.recipe_name,
        "batch_id": job.batch_id,
        "fingerprint": job.fingerprint,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }
