"""How far batches are, counted from their jobs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, func, or_, select

from infra.job_model import HELD, WAITING, JobState
from infra.schema import batch_items, jobs

BatchState = Literal["running", "succeeded", "partial", "failed", "cancelled"]
REFUSED = "refused"
"""The state of an item whose job was never made."""

# An item has lost its job without a reason when the collector has forgotten the job, long after it ended.
KNOWN = or_(batch_items.c.job_id.is_not(None), batch_items.c.detail.is_not(None))

Tally = Mapping[tuple[str, str], int]
"""How many items there are by kind of job and state; those without a job are quantize and refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkCounts:
    """How many pieces of work of one kind are where."""

    total: int
    waiting: int
    running: int
    succeeded: int
    failed: int
    """Also what was refused."""
    refused: int
    """Of the failed ones, those that never had a job: there is nothing to retry."""
    cancelled: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchProgress:
    """How far a batch is."""

    jobs: WorkCounts
    evaluations: WorkCounts

    @property
    def state(self) -> BatchState:
        """running, succeeded, partial (it has ended, and not all has succeeded), failed or cancelled."""
        kinds = (self.jobs, self.evaluations)
        if any(each.waiting or each.running for each in kinds):
            return "running"
        if all(each.succeeded == each.total for each in kinds):
            return "succeeded"
        if any(each.succeeded for each in kinds):
            return "partial"
        return "failed" if any(each.failed for each in kinds) else "cancelled"


def tallies(connection: Connection, batch_ids: Iterable[str]) -> Mapping[str, Tally]:
    """Return the counts of each of these batches."""
    kind = func.coalesce(jobs.c.kind, "quantize")
    state = func.coalesce(jobs.c.state, REFUSED)
    query = (
        select(batch_items.c.batch_id, kind, state, func.count())
        .outerjoin(jobs, jobs.c.id == batch_items.c.job_id)
        .where(batch_items.c.batch_id.in_(list(batch_ids)), KNOWN)
        .group_by(batch_items.c.batch_id, kind, state)
    )
    found: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for batch_id, job_kind, job_state, count in connection.execute(query):
        found[batch_id][job_kind, job_state] = count
    return found


def progress_of(tally: Tally) -> BatchProgress:
    """Return how far a batch with these counts is."""
    return BatchProgress(jobs=_counts(tally, "quantize"), evaluations=_counts(tally, "evaluate"))


def _counts(tally: Tally, kind: str) -> WorkCounts:
    by_state = {state: count for (job_kind, state), count in tally.items() if job_kind == kind}

    def total(*states: str) -> int:
        return sum(by_state.get(state, 0) for state in states)

    return WorkCounts(
        total=sum(by_state.values()),
        waiting=total(*WAITING),
        running=total(*HELD),
        succeeded=total(JobState.SUCCEEDED),
        failed=total(JobState.FAILED, REFUSED),
        refused=total(REFUSED),
        cancelled=total(JobState.CANCELLED),
    )
